// pair_softmax on the CPU: statistics, loss and gradients of the softmax over all pairs.

#include "cpu/sweep_finish.h"

namespace ssl_fast {

extern const Kernels<PairSoftmax> SSL_FAST_TABLE(pair_softmax);
const Kernels<PairSoftmax> SSL_FAST_TABLE(pair_softmax) = {workspace_bytes<PairSoftmax>,
                                                           run<PairSoftmax>};

}  // namespace ssl_fast
