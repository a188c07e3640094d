// How a block walks over the classes of a row of logits: 16 bytes at a time where rows allow it.
#pragma once

#include <cstring>
#include <type_traits>

#include "common/launch.h"
#include "common/warp.h"

namespace grace::gated_dkd {

constexpr int kThreads = 256;
constexpr int kBatch = 2;  // loads of a thread, of each model, that are under way together

// Elements that are loaded and stored together.
template <typename T, int N>
struct alignas(N * sizeof(T)) Vector {
  T at[N];
};

template <typename T>
constexpr int kWide = 16 / sizeof(T);

template <int N, typename T>
__device__ __forceinline__ Vector<T, N> load(const T* from) {
  return *reinterpret_cast<const Vector<T, N>*>(from);
}

// Two bf16 are two instructions to unpack and one to round, if they are taken together.
template <int N, typename T>
__device__ __forceinline__ void unpack(const Vector<T, N>& from, float (&to)[N]) {
  if constexpr (std::is_same_v<T, bf16> && N % 2 == 0) {
    Vector<uint32_t, N / 2> words;
    memcpy(&words, &from, sizeof words);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      to[2 * i] = float_of_bits(words.at[i] << 16);
      to[2 * i + 1] = float_of_bits(words.at[i] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = to_float(from.at[i]);
  }
}

template <int N, typename T>
__device__ __forceinline__ void store(T* to, const float (&from)[N]) {
  if constexpr (std::is_same_v<T, bf16> && N % 2 == 0) {
    Vector<uint32_t, N / 2> words;
#pragma unroll
    for (int i = 0; i < N / 2; ++i)
      words.at[i] = pair_from_floats<bf16>(from[2 * i], from[2 * i + 1]);
    *reinterpret_cast<Vector<uint32_t, N / 2>*>(to) = words;
  } else {
    Vector<T, N> rounded;
#pragma unroll
    for (int i = 0; i < N; ++i) rounded.at[i] = from_float<T>(from[i]);
    *reinterpret_cast<Vector<T, N>*>(to) = rounded;
  }
}

// How many elements past a multiple of 16 bytes.
template <typename T>
__device__ __forceinline__ int misalignment(const T* row) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(T) % kWide<T>);
}

constexpr int kUneven = -1;  // rows that lie differently

// Shares `count` classes among the block's threads: use.template operator()<N>(first, loaded) is
// for N classes from `first`, with loaded = load.template operator()<N>(first); at a multiple of 16
// bytes where N > 1. A row of an odd vocabulary begins anywhere, so rows are wide in the middle if
// all are `offset` elements past such a multiple, and single elements throughout if kUneven.
template <typename T, typename Load, typename Use>
__device__ __forceinline__ void for_each(int count, int offset, const Load& load, const Use& use) {
  constexpr int N = kWide<T>;
  constexpr int kStride = kThreads * N;
  int begin = count, end = count;  // of the wide part
  if (offset != kUneven) {
    begin = (N - offset) % N;
    if (begin > count) begin = count;
    end = begin + (count - begin) / N * N;
  }
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < begin; i += kThreads)
    use.template operator()<1>(i, load.template operator()<1>(i));

  int i = begin + thread * N;
  for (; i + (kBatch - 1) * kStride < end; i += kBatch * kStride) {
    decltype(load.template operator()<N>(0)) loaded[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) loaded[b] = load.template operator()<N>(i + b * kStride);
#pragma unroll
    for (int b = 0; b < kBatch; ++b) use.template operator()<N>(i + b * kStride, loaded[b]);
  }
  for (; i < end; i += kStride) use.template operator()<N>(i, load.template operator()<N>(i));

  for (int j = end + thread; j < count; j += kThreads)
    use.template operator()<1>(j, load.template operator()<1>(j));
}

// A row's logits.
template <typename T>
struct Line {
  const T* student;  // [classes]
  const T* teacher;  // [at least shared]
  int classes;
  int shared;  // classes that both have
  int target;
};

// Logits of both models at the same classes.
template <typename T, int N>
struct Pair {
  Vector<T, N> student, teacher;
};

// use.template operator()<N>(first, z, w) for all classes that both have; `third` is of the rows
// that may not be wide where they lie differently.
template <typename T, typename Use>
__device__ __forceinline__ void for_shared(const Line<T>& line, const T* third, const Use& use) {
  const auto load_both = [&]<int N>(int first) {
    return Pair<T, N>{load<N>(line.student + first), load<N>(line.teacher + first)};
  };
  const auto use_both = [&]<int N>(int first, const Pair<T, N>& pair) {
    float z[N], w[N];
    unpack(pair.student, z);
    unpack(pair.teacher, w);
    use.template operator()<N>(first, z, w);
  };
  const int offset = misalignment(line.student);
  const bool even = offset == misalignment(line.teacher) && offset == misalignment(third);
  for_each<T>(line.shared, even ? offset : kUneven, load_both, use_both);
}

// use(z) for all classes that the student alone has.
template <typename T, typename Use>
__device__ __forceinline__ void for_padding(const Line<T>& line, const Use& use) {
  for (int i = line.shared + static_cast<int>(threadIdx.x); i < line.classes; i += kThreads)
    use(to_float(line.student[i]));
}

}  // namespace grace::gated_dkd
