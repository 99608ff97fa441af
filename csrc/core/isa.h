#pragma once
// The one place that knows which ISAs were compiled, what this CPU runs, and which one serves.

#include <string>
#include <vector>

#include "core/clustering.h"
#include "core/kl_divergence.h"
#include "core/l2_sp.h"
#include "core/linear_reconstruction.h"
#include "core/mae.h"
#include "core/pair_sigmoid.h"
#include "core/pair_softmax.h"
#include "core/reconstruction.h"

namespace ssl_fast {

// What the machine can do at best. Multiply-adds in registers alone, `rounds` times: they return
// how many floating-point operations they did. And the floor of a pass over memory: to[i] = a[i] +
// b[i] for i < n, `to` aligned to 64 bytes and written past the caches.
struct PeakKernels {
    double (*fp32)(long rounds);
    double (*bf16)(long rounds);  // null where bfloat16 is widened
    void (*stream)(const float* a, const float* b, float* to, std::int64_t n, Team* team);
};

struct Isa {
    const char* name;
    bool (*supported)();
    // Chosen without being asked for by name. An ISA can be supported and still be slower.
    bool (*preferred)();
    const Kernels<PairSoftmax>* pair_softmax;
    const Kernels<PairSoftmaxSymmetric>* pair_softmax_symmetric;
    const Kernels<PairSigmoid>* pair_sigmoid;
    const Kernels<Nearest>* nearest;
    const Kernels<CentroidUpdate>* centroid_update;
    const Kernels<TopK>* top_k;
    const Kernels<PlusPlus>* plus_plus;
    const Kernels<Mae>* mae;
    const Kernels<KlDivergence>* kl_divergence;
    const Kernels<L2Sp>* l2_sp;
    const Kernels<LinearReconstruction>* linear_reconstruction;
    const Kernels<Reconstruction>* reconstruction;
    const PeakKernels* peak;
};

// From the simplest to the most capable.
std::vector<const Isa*> compiled_isas();
std::vector<const Isa*> available_isas();

// What SSL_FAST_CPU_ISA names, else the last available and preferred one. Throws
// std::invalid_argument where the variable names an ISA that this CPU or build lacks.
const Isa& active_isa();
// "" goes back to the choice above.
void set_isa(const std::string& name);

}  // namespace ssl_fast
