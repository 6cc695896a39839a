// From tensors to what the kernels work on.
#pragma once

#include <ATen/ATen.h>

#include <concepts>

namespace molex {

// Call use(values) with the values of a tensor in their type.
template <class Use>
void with_values(const at::Tensor& x, const Use& use) {
  if (x.scalar_type() == at::kBFloat16)
    use(x.const_data_ptr<at::BFloat16>());
  else
    use(x.const_data_ptr<float>());
}

// Rows of a contiguous tensor [n, width], which has to outlive them. A tensor looks whether it has data each time it is
// asked where that is.
template <class T>
struct Matrix {
  Matrix(T* values, int64_t width) : values(values), width(width) {}
  template <class U>
    requires std::convertible_to<U*, T*>
  Matrix(const Matrix<U>& other) : values(other.values), width(other.width) {}

  T* row(int64_t i) const { return values + i * width; }

  T* values;
  int64_t width;
};

template <class T>
Matrix<const T> matrix_of(const at::Tensor& x) {
  return {x.const_data_ptr<T>(), x.size(1)};
}

template <class T>
Matrix<T> matrix_of(at::Tensor& x) {
  return {x.mutable_data_ptr<T>(), x.size(1)};
}

}  // namespace molex
