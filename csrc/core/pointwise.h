#pragma once
// Which loss of one input and one target. The numbers are the places in KINDS of
// ssl_fast/backends/reference/pointwise.py.

namespace ssl_fast {

enum class Kind : int { mse, l1, smooth_l1, huber, bce, bce_with_logits };

}  // namespace ssl_fast
