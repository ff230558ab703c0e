// The library that Python calls, all but the plans: fused_peft/backends/extension.py adds those.
#include "cast.cuh"
#include "launch.cuh"

using namespace fused_peft;

// Of what fused_peft/backends/plans.py declares too, and of a kernel's parameters.
extern "C" int fused_peft_sizes(int which) {
  const int sizes[] = {sizeof(Call), sizeof(Cast), sizeof(Parameters)};
  return sizes[which];
}

#ifdef FUSED_PEFT_EMULATE
extern "C" Status fused_peft_cast(const Cast* c) {
  for (int64_t i = 0; i < c->size(0) + c->size(1); ++i) c->dtype == BF16 ? cast_one<bf16>(*c, i) : cast_one<fp16>(*c, i);
  return nullptr;
}

// From now on the function called at this line of gemm.cuh, one of those that order or wait, does nothing; 0: none.
extern "C" void fused_peft_leave_out(int line) { emulator::left_out = line; }
#else
extern "C" Status fused_peft_open(const char* library) { return driver.open(library); }

static Kernel kernel_cast;
extern "C" Status fused_peft_load_cast(const void* cubin) { return driver.read(&kernel_cast, cubin, "fused_peft_cast"); }

extern "C" Status fused_peft_cast(const Cast* c) {
  if (Status wrong = driver.bind(c->device)) return wrong;
  unsigned blocks = static_cast<unsigned>((c->size(0) + c->size(1) + 255) / 256);
  void* parameters[1] = {const_cast<Cast*>(c)};
  return driver.said(driver.launch(kernel_cast.handle, blocks, 1, 1, 256, 1, 1, 0, c->stream, parameters, nullptr));
}
#endif
