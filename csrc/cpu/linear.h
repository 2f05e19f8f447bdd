// Threading of the linear layer: which rows and superblocks run together.
#pragma once

#include "kernels.h"

namespace resq {

// y [rows, n] for args.plan; `quantize` describes x, its outputs are scratch of this call.
void run_linear(QuantizeArgs quantize, LinearArgs args, int64_t rows);

}  // namespace resq
