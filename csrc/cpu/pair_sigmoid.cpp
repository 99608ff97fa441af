// pair_sigmoid on the CPU: the sum of softplus over all pairs and its gradient, three products in
// one pass.

#include "cpu/sweep_finish.h"

namespace ssl_fast {

extern const Kernels<PairSigmoid> SSL_FAST_TABLE(pair_sigmoid);
const Kernels<PairSigmoid> SSL_FAST_TABLE(pair_sigmoid) = {workspace_bytes<PairSigmoid>,
                                                           run<PairSigmoid>};

}  // namespace ssl_fast
