// From tensors to what the kernels work on.
#pragma once

#include <ATen/ATen.h>

namespace molex {

// Call use(values) with the values of a tensor in their type.
template <class Use>
void with_values(const at::Tensor& x, const Use& use) {
  if (x.scalar_type() == at::kBFloat16)
    use(x.const_data_ptr<at::BFloat16>());
  else
    use(x.const_data_ptr<float>());
}

}  // namespace molex
