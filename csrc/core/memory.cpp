#include "core/memory.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ssl_fast {

void advise_huge_pages(std::uintptr_t address, std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr std::uintptr_t PAGE = 4096, HUGE_PAGE = std::uintptr_t{2} << 20;
    if (bytes < HUGE_PAGE) return;
    const std::uintptr_t begin = (address + PAGE - 1) / PAGE * PAGE;
    const std::uintptr_t end = (address + bytes) / PAGE * PAGE;
    // Only a hint: a kernel without huge pages refuses, and nothing is lost.
    static_cast<void>(madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE));
#else
    static_cast<void>(address);
    static_cast<void>(bytes);
#endif
}

}  // namespace ssl_fast
