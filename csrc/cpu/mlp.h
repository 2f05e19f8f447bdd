// The MLP of a decoder layer on checked layers.
#pragma once

#include "layer.h"

namespace resq {

// Rows that go through run_mlp together, of `rows` whose gate_up outputs have row_bytes.
int64_t mlp_rows_at_once(int64_t rows, int64_t row_bytes);

void check_mlp(const CheckedLayer& up, const CheckedLayer& down);

// gate_up with `norm`, which has a residual, before it and down with SiLU·mul before it: out [rows, down's n]. `inner`
// has room for gate_up's output of mlp_rows_at_once rows.
void run_mlp(const CheckedLayer& up, const CheckedLayer& down, const RowsAt& x, const BeforeArgs& norm, void* inner,
             void* out);

}  // namespace resq
