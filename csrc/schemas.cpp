// Every operator of the namespace `vimnas_ds`, one schema each, and the Python module whose import
// registers them. Names with a leading underscore are the kernels (CPU, CUDA, Meta; `_gelu` is
// PyTorch's off the CPU); the others add gradients and are what Python calls.
#include <Python.h>
#include <torch/library.h>

TORCH_LIBRARY(vimnas_ds, m) {
  m.def(
      "sliced_linear(Tensor x, Tensor weight, Tensor bias, int out_features, bool gelu=False)"
      " -> Tensor[]");
  m.def(
      "_sliced_linear(Tensor x, Tensor weight, Tensor bias, int out_features, bool gelu)"
      " -> (Tensor, Tensor)");
  m.def(
      "_sliced_linear_backward(Tensor[] dy, Tensor x, Tensor weight, Tensor pre, bool need_dx,"
      " bool need_dw, bool need_db) -> (Tensor, Tensor, Tensor)");

  m.def("_gelu(Tensor pre) -> Tensor");
  m.def(
      "sliced_mlp(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, int hidden,"
      " int out_features) -> Tensor");

  m.def("gated_norm(Tensor x, Tensor mass, Tensor weight, Tensor bias, float eps) -> Tensor");
  m.def(
      "_gated_norm(Tensor x, Tensor mass, Tensor weight, Tensor bias, float eps)"
      " -> (Tensor, Tensor)");
  m.def(
      "_gated_norm_backward(Tensor dy, Tensor x, Tensor mass, Tensor weight, Tensor bias,"
      " Tensor stats) -> (Tensor, Tensor)");
  m.def("gated_gelu(Tensor x, Tensor mass) -> Tensor");
  m.def("_gated_gelu(Tensor x, Tensor mass) -> Tensor");
  m.def("_gated_gelu_backward(Tensor dy, Tensor x, Tensor mass) -> (Tensor, Tensor)");
  m.def("head_gate(Tensor x, Tensor mass) -> Tensor");
  m.def("_head_gate(Tensor x, Tensor mass) -> Tensor");
  m.def("_head_gate_backward(Tensor dy, Tensor x, Tensor mass) -> (Tensor, Tensor)");

  m.def(
      "sliced_adamw_(Tensor(a!) param, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq,"
      " Tensor boxes, Tensor rates, float decay, float beta1, float beta2, float eps) -> ()");
}

static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C",    nullptr, -1,     nullptr,
                             nullptr,               nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C() {
  PyObject* m = PyModule_Create(&module);
#ifdef VIMNAS_WITH_CUDA
  PyModule_AddIntConstant(m, "with_cuda", 1);
#else
  PyModule_AddIntConstant(m, "with_cuda", 0);
#endif
  return m;
}
