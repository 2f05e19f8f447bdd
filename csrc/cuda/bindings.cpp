// The Python module resq_vllm._C_cuda: importing it registers the CUDA implementations of the ops, whose schemas are in
// ../bindings.cpp. Its attributes say what was built, so that resq_vllm/cuda.py can compare it with the machine.
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include "launch.h"

static PyObject* driver_version(PyObject*, PyObject*) { return PyLong_FromLong(resq::cuda::driver_version()); }

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C_cuda() {
  static PyMethodDef methods[] = {{"driver_version", driver_version, METH_NOARGS, nullptr},
                                  {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, methods,
                               nullptr, nullptr, nullptr, nullptr};
  PyObject* m = PyModule_Create(&module);
  if (!m) return nullptr;
  // RESQ_CUDA_ARCHS: "sm_80 sm_90a compute_90", as given to nvcc.
  if (PyModule_AddStringConstant(m, "archs", RESQ_CUDA_ARCHS) ||
      PyModule_AddIntConstant(m, "runtime_version", resq::cuda::runtime_version())) {
    Py_DECREF(m);
    return nullptr;
  }
  return m;
}
