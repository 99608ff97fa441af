#pragma once
// Choosing a path inside one ISA, and the names under which the ISA's tables are linked.

#include "cpu/products.h"

#ifndef SSL_FAST_ISA
#error "compiled once per ISA, which SSL_FAST_ISA names"
#endif

#define SSL_FAST_JOIN_(op, isa) op##_##isa
#define SSL_FAST_JOIN(op, isa) SSL_FAST_JOIN_(op, isa)
#define SSL_FAST_TABLE(op) SSL_FAST_JOIN(op, SSL_FAST_ISA)

namespace ssl_fast {
namespace {

template <class Path>
struct PathTag {
    using type = Path;
};

template <class Body>
auto with_path(Dtype dtype, Body body) {
#if defined(__AVX512BF16__)
    if (dtype == Dtype::bfloat16) return body(PathTag<Bf16Path>{});
#endif
    static_cast<void>(dtype);
    return body(PathTag<FloatPath>{});
}

// What a thread holds while it multiplies.
template <class Path>
struct PathScope {
    PathScope() {}
};
#if defined(__AMX_BF16__)
template <>
struct PathScope<Bf16Path> {
    MatrixUnit unit;
};
#endif

}  // namespace
}  // namespace ssl_fast
