// Arrays without slack, so that a sanitizer sees the first element read or written beyond them.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

#include "random.h"

namespace stress {

// An array on the heap whose last byte is the last of its block. Its start lies on the allocator's
// boundary or `shift` elements beyond it: kernels must not count on an alignment.
template <typename T>
class Exact {
 public:
  Exact() = default;
  explicit Exact(int64_t size, int64_t shift = 0, T value = T())
      : size_(size), block_(static_cast<T*>(std::malloc((size + shift) * sizeof(T)))) {
    if (!block_ && size + shift > 0) throw std::bad_alloc();
    data_ = block_ ? block_ + shift : nullptr;
    std::fill(begin(), end(), value);
  }
  Exact(const Exact& other) : Exact(other.size_, other.data_ - other.block_) {
    std::copy(other.begin(), other.end(), data_);
  }
  Exact(Exact&& other) noexcept { swap(other); }
  Exact& operator=(Exact other) noexcept {
    swap(other);
    return *this;
  }
  ~Exact() { std::free(block_); }

  // The first `size` elements; what is new is `value`.
  Exact resized(int64_t size, T value = T()) const {
    Exact other(size, data_ - block_, value);
    std::copy(begin(), begin() + std::min(size, size_), other.data_);
    return other;
  }

  T* data() { return data_; }
  const T* data() const { return data_; }
  int64_t size() const { return size_; }
  T* begin() { return data_; }
  T* end() { return data_ + size_; }
  const T* begin() const { return data_; }
  const T* end() const { return data_ + size_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

 private:
  void swap(Exact& other) noexcept {
    std::swap(size_, other.size_);
    std::swap(block_, other.block_);
    std::swap(data_, other.data_);
  }

  int64_t size_ = 0;
  T* block_ = nullptr;
  T* data_ = nullptr;
};

}  // namespace stress
