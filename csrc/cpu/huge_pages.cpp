#include "huge_pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace resq {
namespace {

#if defined(__linux__)
constexpr int kCollapse = 25;  // MADV_COLLAPSE, Linux 6.1; older headers lack the name, older kernels refuse it

// Advises the whole pages of [data, data + bytes).
void advise(void* data, int64_t bytes, int advice, uintptr_t page = kHugePage) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (at + page - 1) / page * page, end = (at + static_cast<uintptr_t>(bytes)) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, advice);
}
#endif

}  // namespace

#if defined(__linux__)
void prefer_huge_pages(void* data, int64_t bytes) { advise(data, bytes, MADV_HUGEPAGE); }
void collapse_pages(void* data, int64_t bytes) { advise(data, bytes, kCollapse); }
void forget_pages(void* data, int64_t bytes) {
  advise(data, bytes, MADV_DONTNEED, static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)));
}
#else
void prefer_huge_pages(void*, int64_t) {}
void collapse_pages(void*, int64_t) {}
void forget_pages(void*, int64_t) {}
#endif

}  // namespace resq
