// The transforms of Winograd's algorithm, vectorised over 8 or 16 adjacent channels.

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <cstring>
#include <utility>

namespace {

// The matrices of Cook and Toom interpolate at the first of these points, which give the least
// error, and at infinity. Without infinity the same weights give one pixel less.
constexpr double kPoints[] = {0, 1, -1, 2, -2};

template <int m_, int r_, bool infinity = true>
struct Toom {
  static constexpr int m = m_, r = r_, n = m + r - 1, finite = infinity ? n - 1 : n;
  using Smaller = Toom<m - 1, r, false>;
  double input[n][n] = {};
  double output[m][n] = {};

  constexpr Toom() {
    for (int i = 0; i < n; i++) {
      // Row i: the coefficients of the product of (x - point) over all other points.
      double c[n] = {1};
      int degree = 0;
      for (int k = 0; k < finite; k++) {
        if (k == i) continue;
        for (int j = ++degree; j >= 0; j--) {
          c[j] = (j > 0 ? c[j - 1] : 0) - kPoints[k] * (j < degree ? c[j] : 0);
        }
      }
      for (int j = 0; j <= degree; j++) input[i][j] = c[j];
      double power = 1;
      for (int j = 0; j < m; j++) {
        output[j][i] = i < finite ? power : (j == m - 1);
        if (i < finite) power *= kPoints[i];
      }
    }
  }
};

// Passes a type as an empty value: a Toom object would be computed anew each time.
template <class T>
struct Type {
  using of = T;
};

template <class T>
struct InputOf {
  static constexpr T table{};
  static constexpr int rows = T::n, cols = T::n;
  static constexpr double at(int i, int j) { return table.input[i][j]; }
};

template <class T>
struct OutputOf {
  static constexpr T table{};
  static constexpr int rows = T::m, cols = T::n;
  static constexpr double at(int i, int j) { return table.output[i][j]; }
};

// Vectors of adjacent channels; the compiler maps them to the processor's registers.
template <int lanes>
struct Types;
template <>
struct Types<16> {
  typedef float floats __attribute__((vector_size(64)));
  typedef uint32_t words __attribute__((vector_size(64)));
  typedef uint16_t halves __attribute__((vector_size(32)));
};
template <>
struct Types<8> {
  typedef float floats __attribute__((vector_size(32)));
  typedef uint32_t words __attribute__((vector_size(32)));
  typedef uint16_t halves __attribute__((vector_size(16)));
};
inline auto wide(Types<16>::halves x) { return __builtin_convertvector(x, Types<16>::words); }
inline auto wide(Types<8>::halves x) { return __builtin_convertvector(x, Types<8>::words); }
inline auto narrow(Types<16>::words x) { return __builtin_convertvector(x, Types<16>::halves); }
inline auto narrow(Types<8>::words x) { return __builtin_convertvector(x, Types<8>::halves); }

template <int lanes>
struct Lanes {
  using type = typename Types<lanes>::floats;

  static type load(const float* from) {
    type x;
    std::memcpy(&x, from, sizeof(x));
    return x;
  }
  static void store(float* to, type x) { std::memcpy(to, &x, sizeof(x)); }
  static type load(const at::BFloat16* from) {
    typename Types<lanes>::halves x;
    std::memcpy(&x, from, sizeof(x));
    return (type)(wide(x) << 16);
  }
  static void store(at::BFloat16* to, type x) {
    // Round to nearest, ties to even. A NaN with every bit set would become zero; none occurs.
    auto bits = (typename Types<lanes>::words)x;
    auto rounded = narrow((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    std::memcpy((void*)to, &rounded, sizeof(rounded));
  }
};

template <class M, int i, int j, class V>
inline void add_term(V& sum, const V& x) {
  constexpr double c = M::at(i, j);
  if constexpr (c == 1) {
    sum += x;
  } else if constexpr (c == -1) {
    sum -= x;
  } else if constexpr (c != 0) {
    sum += (float)c * x;
  }
}

template <class M, int i, class V, int... j>
inline V row(const V* x, int step, std::integer_sequence<int, j...>) {
  V sum{};
  (add_term<M, i, j>(sum, x[j * step]), ...);
  return sum;
}

template <class M, class V, int... i>
inline void times(const V* x, int step, V* y, int step_y, std::integer_sequence<int, i...>) {
  ((y[i * step_y] = row<M, i>(x, step, std::make_integer_sequence<int, M::cols>{})), ...);
}

// y (Y::rows, X::rows) = Y x X^T of x (Y::cols, X::cols)
template <class Y, class X, class V>
inline void both_ways(const V* x, V* y) {
  V half[Y::rows * X::cols];
  for (int j = 0; j < X::cols; j++) {
    times<Y>(x + j, X::cols, half + j, X::cols, std::make_integer_sequence<int, Y::rows>{});
  }
  for (int i = 0; i < Y::rows; i++) {
    times<X>(half + i * X::cols, 1, y + i * X::rows, 1,
             std::make_integer_sequence<int, X::rows>{});
  }
}

}  // namespace

