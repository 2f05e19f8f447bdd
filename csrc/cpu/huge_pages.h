// Weights on 2 MiB pages.
#pragma once

#include <cstdint>

namespace resq {

constexpr int64_t kHugePage = int64_t{2} << 20;

// Asks for 2 MiB pages in [data, data + bytes), whole ones only, so that no memory is added. Call it before the first
// write; `collapse_pages` after the last one brings together what the allocator had already touched. Without support
// (another kernel, transparent_hugepage = never) both do nothing: results are the same, reading is slower.
void prefer_huge_pages(void* data, int64_t bytes);
void collapse_pages(void* data, int64_t bytes);

// Drops the contents of [data, data + bytes), freshly allocated memory: what an earlier owner had touched takes no
// memory until it is written again, and can then become a 2 MiB page.
void forget_pages(void* data, int64_t bytes);

}  // namespace resq
