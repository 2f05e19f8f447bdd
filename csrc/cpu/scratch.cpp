// Buffers of the calling thread: grown on demand, kept until the thread ends, so that a decode step allocates nothing.
#include <cstdlib>
#include <new>

#include "kernels.h"

namespace resq {
namespace {

constexpr int64_t kAlignment = 64;
constexpr int64_t kSlack = 64;  // vectors may read past the last element

struct Buffer {
  void* data = nullptr;
  int64_t bytes = 0;
  ~Buffer() { std::free(data); }
};

thread_local Buffer buffers[static_cast<int>(Slot::count)];

}  // namespace

void* thread_scratch(Slot slot, int64_t bytes) {
  Buffer& buffer = buffers[static_cast<int>(slot)];
  if (buffer.bytes < bytes) {
    std::free(buffer.data);
    buffer.bytes = 0;
    const int64_t size = (bytes + kSlack + kAlignment - 1) / kAlignment * kAlignment;
    buffer.data = std::aligned_alloc(kAlignment, static_cast<size_t>(size));
    if (!buffer.data) throw std::bad_alloc();
    buffer.bytes = bytes;
  }
  return buffer.data;
}

}  // namespace resq
