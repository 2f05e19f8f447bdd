#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace resq {
namespace {

struct Candidate {
  const char* name;
  const Kernels* kernels;  // null: this machine lacks it
};

constexpr int kCandidates = 7;

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("bmi2");
}

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
         __builtin_cpu_supports("bmi2");
}

// VNNI on 256-bit registers in AVX's encoding: processors without AVX-512.
bool has_avx_vnni() {
  constexpr unsigned kAvxVnni = 1u << 4;  // CPUID leaf 7, subleaf 1, EAX
  unsigned a = 0, b = 0, c = 0, d = 0;
  return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kAvxVnni);
}

// Zen's own prefetching reads one stream of weights fastest (micro_avx512.h).
const Kernels* avx512_kernels() { return __builtin_cpu_is("amd") ? &kAvx512InOrderKernels : &kAvx512Kernels; }

// The processor has AMX for int8, and the kernel lets this process (all of its threads) use the 8 KiB of tile state.
bool has_amx() {
#if defined(__linux__)
  constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25;  // CPUID leaf 7, EDX
  constexpr int kRequestPermission = 0x1023;              // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;                           // XFEATURE_XTILEDATA
  unsigned a = 0, b = 0, c = 0, d = 0;
  return has_avx512() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTile) && (d & kInt8) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

// Best first; every known name is listed on every machine, so that a typo and a missing feature read differently.
const Candidate* candidates() {
  static const Candidate list[kCandidates] = {
#if defined(__x86_64__)
      {"amx_int8", has_amx() ? &kAmxKernels : nullptr},
      {"avx512_vnni", has_avx512() ? avx512_kernels() : nullptr},
      {"avx2_vnni", has_avx_vnni() ? &kAvx2VnniKernels : nullptr},
      {"avx2", has_avx2() ? &kAvx2Kernels : nullptr},
      {"avx512_vnni:side_by_side", has_avx512() ? &kAvx512Kernels : nullptr},
      {"avx512_vnni:in_order", has_avx512() ? &kAvx512InOrderKernels : nullptr},
#else
      {"amx_int8", nullptr},
      {"avx512_vnni", nullptr},
      {"avx2_vnni", nullptr},
      {"avx2", nullptr},
      {"avx512_vnni:side_by_side", nullptr},
      {"avx512_vnni:in_order", nullptr},
#endif
      {"portable", &kPortableKernels},
  };
  return list;
}

const Kernels* find(const std::string& name, const char* source) {
  std::string available;
  for (int i = 0; i < kCandidates; ++i) {
    const Candidate& c = candidates()[i];
    if (!c.kernels) continue;
    if (name.empty() || name == c.name) return c.kernels;
    available += (available.empty() ? "" : ", ") + std::string(c.name);
  }
  for (int i = 0; i < kCandidates; ++i)
    if (name == candidates()[i].name)
      throw std::runtime_error(std::string(source) + " is " + name + ", which this machine cannot run: choose one of " +
                               available);
  throw std::runtime_error(std::string(source) + " is " + name + ", which is no known instruction set: choose one of " +
                           available);
}

std::atomic<const Kernels*> chosen{nullptr};

}  // namespace

const Kernels& kernels() {
  const Kernels* current = chosen.load(std::memory_order_acquire);
  if (!current) {
    const char* forced = std::getenv("RESQ_ISA");
    current = find(forced ? forced : "", "the environment variable RESQ_ISA");
    chosen.store(current, std::memory_order_release);
  }
  return *current;
}

std::string set_isa(const std::string& name) {
  const Kernels* next = find(name, "the instruction set");
  chosen.store(next, std::memory_order_release);
  return next->name;
}

}  // namespace resq
