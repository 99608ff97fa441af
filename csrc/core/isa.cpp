#include "core/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ssl_fast {

#define SSL_FAST_TABLES(isa)                                                 \
    extern const Kernels<PairSoftmax> pair_softmax_##isa;                    \
    extern const Kernels<PairSoftmaxSymmetric> pair_softmax_symmetric_##isa; \
    extern const Kernels<PairSigmoid> pair_sigmoid_##isa;                    \
    extern const Kernels<Nearest> nearest_##isa;                             \
    extern const Kernels<CentroidUpdate> centroid_update_##isa;              \
    extern const Kernels<TopK> top_k_##isa;                                  \
    extern const Kernels<PlusPlus> plus_plus_##isa;                          \
    extern const Kernels<Mae> mae_##isa;                                     \
    extern const Kernels<KlDivergence> kl_divergence_##isa;                  \
    extern const Kernels<L2Sp> l2_sp_##isa;                                  \
    extern const Kernels<LinearReconstruction> linear_reconstruction_##isa;  \
    extern const Kernels<Reconstruction> reconstruction_##isa;               \
    extern const PeakKernels peak_##isa;
SSL_FAST_TABLES(baseline)
#if defined(SSL_FAST_HAVE_AVX2)
SSL_FAST_TABLES(avx2)
#endif
#if defined(SSL_FAST_HAVE_AVX512)
SSL_FAST_TABLES(avx512)
#endif
#if defined(SSL_FAST_HAVE_AVX512_BF16)
SSL_FAST_TABLES(avx512_bf16)
#endif
#if defined(SSL_FAST_HAVE_AMX_BF16)
SSL_FAST_TABLES(amx_bf16)
#endif
#undef SSL_FAST_TABLES

namespace {

bool always() { return true; }

#if defined(__x86_64__)

// GCC's check covers both CPUID and the state that the OS saves.
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
}
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// Intel's cores run vdpbf16ps at half the rate of an fp32 multiply-add (118 against 237 GFLOP/s on
// one core of an Intel Xeon with AMX), so that widening wins; AMD's Zen 4 runs it at twice the
// rate.
bool fast_avx512_bf16() { return has_avx512_bf16() && __builtin_cpu_is("amd"); }

#if defined(SSL_FAST_HAVE_AMX_BF16) && defined(__linux__)
bool has_amx_bf16() {
    if (!has_avx512_bf16()) return false;
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;
    if ((d & AMX_BF16) == 0 || (d & AMX_TILE) == 0) return false;
    // Linux hands out the tile state on request only, for the process.
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    static const bool granted =
        syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
    return granted;
}
#else
bool has_amx_bf16() { return false; }
#endif

#endif

#define SSL_FAST_ENTRY(isa, supported, preferred) \
    {#isa,                                        \
     supported,                                   \
     preferred,                                   \
     &pair_softmax_##isa,                         \
     &pair_softmax_symmetric_##isa,               \
     &pair_sigmoid_##isa,                         \
     &nearest_##isa,                              \
     &centroid_update_##isa,                      \
     &top_k_##isa,                                \
     &plus_plus_##isa,                            \
     &mae_##isa,                                  \
     &kl_divergence_##isa,                        \
     &l2_sp_##isa,                                \
     &linear_reconstruction_##isa,                \
     &reconstruction_##isa,                       \
     &peak_##isa}

const Isa ISAS[] = {
    SSL_FAST_ENTRY(baseline, always, always),
#if defined(SSL_FAST_HAVE_AVX2)
    SSL_FAST_ENTRY(avx2, has_avx2, has_avx2),
#endif
#if defined(SSL_FAST_HAVE_AVX512)
    SSL_FAST_ENTRY(avx512, has_avx512, has_avx512),
#endif
#if defined(SSL_FAST_HAVE_AVX512_BF16)
    SSL_FAST_ENTRY(avx512_bf16, has_avx512_bf16, fast_avx512_bf16),
#endif
#if defined(SSL_FAST_HAVE_AMX_BF16)
    SSL_FAST_ENTRY(amx_bf16, has_amx_bf16, has_amx_bf16),
#endif
};
#undef SSL_FAST_ENTRY

std::string names(const std::vector<const Isa*>& isas) {
    std::string list;
    for (const Isa* isa : isas) list += (list.empty() ? "" : ", ") + std::string(isa->name);
    return list;
}

const Isa* find(const std::string& name, const char* argument) {
    for (const Isa* isa : available_isas())
        if (name == isa->name) return isa;
    throw std::invalid_argument(std::string(argument) + " must be one of " +
                                names(available_isas()) + " (what this CPU and build have), got '" +
                                name + "'");
}

const Isa* choose() {
    const char* asked = std::getenv("SSL_FAST_CPU_ISA");
    if (asked != nullptr && *asked != '\0') return find(asked, "SSL_FAST_CPU_ISA");
    const Isa* best = nullptr;
    for (const Isa* isa : available_isas())
        if (isa->preferred()) best = isa;
    return best;
}

std::atomic<const Isa*> active{nullptr};

}  // namespace

std::vector<const Isa*> compiled_isas() {
    std::vector<const Isa*> all;
    for (const Isa& isa : ISAS) all.push_back(&isa);
    return all;
}

std::vector<const Isa*> available_isas() {
    std::vector<const Isa*> here;
    for (const Isa& isa : ISAS)
        if (isa.supported()) here.push_back(&isa);
    return here;
}

const Isa& active_isa() {
    const Isa* isa = active.load(std::memory_order_acquire);
    if (isa == nullptr) {
        isa = choose();
        active.store(isa, std::memory_order_release);
    }
    return *isa;
}

void set_isa(const std::string& name) {
    active.store(name.empty() ? choose() : find(name, "isa"), std::memory_order_release);
}

}  // namespace ssl_fast
