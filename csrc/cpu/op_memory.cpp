// torch.ops.resq.prefer_huge_pages.
#include "../ops.h"
#include "huge_pages.h"
#include "tensors.h"

namespace resq {

void prefer_huge_pages(const Tensor& x) {
  check_contiguous(x, "x");
  const int64_t bytes = x.numel() * x.element_size();
  prefer_huge_pages(x.mutable_data_ptr(), bytes);
  collapse_pages(x.mutable_data_ptr(), bytes);
}

}  // namespace resq
