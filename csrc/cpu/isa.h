// Which set of kernels runs.
#pragma once

#include <string>

#include "kernels.h"

namespace resq {

// The best set this machine can run, or the one that RESQ_ISA or set_isa named. Throws std::runtime_error with one
// sentence when RESQ_ISA names an unknown set or one that the machine lacks.
const Kernels& kernels();

// Choose by name ("" = the best); returns the name that runs now. Throws like kernels().
std::string set_isa(const std::string& name);

}  // namespace resq
