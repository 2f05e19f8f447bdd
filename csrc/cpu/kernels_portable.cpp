// The kernels for any machine: the compiler's baseline instruction set, 128-bit vectors.
#include <cstddef>
#include <cstdint>

#include "kernels.h"
#include "simd/table.h"

namespace resq {
constexpr Kernels kPortableTable = make_kernels<Reading::side_by_side>("portable");
const Kernels kPortableKernels = kPortableTable;
}  // namespace resq
