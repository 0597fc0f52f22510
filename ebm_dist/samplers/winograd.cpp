// Winograd's convolutions of channels-last images, a few tiles of the image at a time.
//
// Outputs are computed in squares of m x m pixels, each from n x n inputs (n = m + r - 1, filters
// of r x r), with n * n products of matrices in place of the m * m * r * r that a direct
// convolution takes (Lavin & Gray, 2016, arXiv:1509.09308). What a tile becomes stays in the
// cache until it is an output again. The products are oneDNN's, by way of torch.
//
// A stride s is written as s * s images beside each other, of every s-th row and column: with
// `stride_in` the channels of the input are those of all s * s of them, and the gradient of such
// a convolution writes all of them, `stride_out`.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <utility>

namespace {

// Cook and Toom's matrices for these points and infinity; the first of them give the least error.
constexpr double kPoints[] = {0, 1, -1, 2, -2};

template <int m_, int r_>
struct Toom {
  static constexpr int m = m_, r = r_, n = m + r - 1;
  double input[n][n] = {};
  double output[m][n] = {};

  constexpr Toom() {
    for (int i = 0; i < n; i++) {
      // Row i: the coefficients of the product of (x - point) over all other points.
      double c[n] = {1};
      int degree = 0;
      for (int k = 0; k < n - 1; k++) {
        if (k == i) continue;
        for (int j = ++degree; j >= 0; j--) {
          c[j] = (j > 0 ? c[j - 1] : 0) - kPoints[k] * (j < degree ? c[j] : 0);
        }
      }
      for (int j = 0; j <= degree; j++) input[i][j] = c[j];
      double power = 1;
      for (int j = 0; j < m; j++) {
        output[j][i] = i < n - 1 ? power : (j == m - 1);
        if (i < n - 1) power *= kPoints[i];
      }
    }
  }
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

// Numbers of neighbouring channels; the compiler makes of them what the processor has.
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
    // To nearest, ties to even. Of a NaN with every bit set it would make zero; none is computed.
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

// y (rows, rows) = M x M^T of x (cols, cols)
template <class M, class V>
inline void both_ways(const V* x, V* y) {
  V half[M::rows * M::cols];
  for (int j = 0; j < M::cols; j++) {
    times<M>(x + j, M::cols, half + j, M::cols, std::make_integer_sequence<int, M::rows>{});
  }
  for (int i = 0; i < M::rows; i++) {
    times<M>(half + i * M::cols, 1, y + i * M::rows, 1,
             std::make_integer_sequence<int, M::rows>{});
  }
}

struct Image {
  int64_t height, width, channels;
  int64_t stride;  // so many rows and columns of it, beside each other, are one
  int64_t before;  // rows and columns of zeros before the first
};

template <class E>
struct Task {
  Image in, out;
  int64_t num_tiles, tiles_y, tiles_x;
  const E *x, *weights, *bias;  // weights (n * n, channels in, channels out)
  E* y;
};

// A thread's share of the tiles, at most `size` at a time.
template <class T, class E>
class Chunk {
  static constexpr int m = T::m, n = T::n;
  const Task<E>& task;
  int64_t wide_in, wide_out;  // channels of all images beside each other
  int64_t gap_in, gap_out;    // from one of the n * n matrices to the next
  at::Tensor memory;
  float* products;     // n * n of (tiles, wide_out)
  E *moved;            // n * n of (tiles, wide_in)
  E *zeros, *nowhere;  // what is read and written beyond the border

 public:
  Chunk(const Task<E>& task, int64_t size)
      : task(task),
        wide_in(task.in.stride * task.in.stride * task.in.channels),
        wide_out(task.out.stride * task.out.stride * task.out.channels),
        // A line more, or all n * n would lie in the same few sets of the cache.
        gap_in(size * wide_in + 64 / sizeof(E)),
        gap_out(size * wide_out + 16) {
    int64_t num_products = n * n * gap_out, num_moved = n * n * gap_in;
    int64_t others = num_moved + task.in.channels + task.out.channels;
    memory = at::empty({4 * num_products + (int64_t)sizeof(E) * others}, at::kByte);
    products = (float*)memory.mutable_data_ptr();
    moved = (E*)(products + num_products);
    zeros = moved + num_moved;
    nowhere = zeros + task.in.channels;
    std::fill(zeros, nowhere, E(0));
  }

  void run(int64_t first, int64_t count) {
    for (int64_t t = 0; t < count; t++) read(first + t, moved + t * wide_in);
    for (int i = 0; i < n * n; i++) {
      at::native::cpublas::brgemm(
          count, wide_out, wide_in, wide_in, wide_out, wide_out, false, moved + i * gap_in,
          task.weights + i * wide_in * wide_out, products + i * gap_out);
    }
    for (int64_t t = 0; t < count; t++) write(first + t, products + t * wide_out);
  }

 private:
  struct Place {
    int64_t image, y, x;
  };
  Place place(int64_t tile) const {
    int64_t per_image = task.tiles_y * task.tiles_x, in_image = tile % per_image;
    return {tile / per_image, in_image / task.tiles_x * m, in_image % task.tiles_x * m};
  }

  // Where the pixels of a square begin, `side` of them on a side; `outside` where there is none.
  template <int side, class P>
  static void pixels(const Image& of, Place at, int64_t p, int64_t q, P* base, P* outside,
                     P** found) {
    for (int i = 0; i < side; i++) {
      int64_t h = of.stride * (at.y + i) + p - of.before;
      for (int j = 0; j < side; j++) {
        int64_t w = of.stride * (at.x + j) + q - of.before;
        bool inside = h >= 0 && h < of.height && w >= 0 && w < of.width;
        found[i * side + j] =
            inside ? base + ((at.image * of.height + h) * of.width + w) * of.channels : outside;
      }
    }
  }

  template <int lanes>
  void read_lanes(const E* const* from, int64_t c, E* to) {
    using L = Lanes<lanes>;
    typename L::type patch[n * n], out[n * n];
    for (int i = 0; i < n * n; i++) patch[i] = L::load(from[i] + c);
    both_ways<InputOf<T>>(patch, out);
    for (int i = 0; i < n * n; i++) L::store(to + i * gap_in + c, out[i]);
  }

  void read(int64_t tile, E* to) {
    const E* from[n * n];
    const Image& in = task.in;
    for (int64_t p = 0; p < in.stride; p++) {
      for (int64_t q = 0; q < in.stride; q++, to += in.channels) {
        pixels<n, const E>(in, place(tile), p, q, task.x, zeros, from);
        int64_t c = 0;
        for (; c + 16 <= in.channels; c += 16) read_lanes<16>(from, c, to);
        for (; c < in.channels; c += 8) read_lanes<8>(from, c, to);
      }
    }
  }

  template <int lanes>
  void write_lanes(const float* from, int64_t c, E* const* to) {
    using L = Lanes<lanes>;
    typename L::type patch[n * n], out[m * m];
    for (int i = 0; i < n * n; i++) patch[i] = L::load(from + i * gap_out + c);
    both_ways<OutputOf<T>>(patch, out);
    typename L::type bias{};
    if (task.bias != nullptr) bias = L::load(task.bias + c);
    for (int i = 0; i < m * m; i++) L::store(to[i] + c, out[i] + bias);
  }

  void write(int64_t tile, const float* from) {
    E* to[m * m];
    const Image& out = task.out;
    for (int64_t p = 0; p < out.stride; p++) {
      for (int64_t q = 0; q < out.stride; q++, from += out.channels) {
        pixels<m, E>(out, place(tile), p, q, task.y, nowhere, to);
        int64_t c = 0;
        for (; c + 16 <= out.channels; c += 16) write_lanes<16>(from, c, to);
        for (; c < out.channels; c += 8) write_lanes<8>(from, c, to);
      }
    }
  }
};

// More would not stay in the cache, fewer would read the weights too often.
constexpr int64_t kTiles = 64;

template <class T, class E>
void convolve(const Task<E>& task) {
  if (task.num_tiles == 0) return;
  // As many chunks as threads, or a multiple of it, of one size.
  int64_t threads = at::get_num_threads();
  int64_t chunks = (task.num_tiles + kTiles - 1) / kTiles;
  chunks = (chunks + threads - 1) / threads * threads;
  int64_t size = (task.num_tiles + chunks - 1) / chunks;
  chunks = (task.num_tiles + size - 1) / size;
  at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    Chunk<T, E> chunk(task, size);
    for (int64_t i = begin; i < end; i++) {
      chunk.run(i * size, std::min(size, task.num_tiles - i * size));
    }
    at::native::cpublas::brgemm_release();
  });
}

template <class E>
void convolve(int64_t m, int64_t r, const Task<E>& task) {
  if (m == 4 && r == 3) return convolve<Toom<4, 3>>(task);
  if (m == 2 && r == 3) return convolve<Toom<2, 3>>(task);
  if (m == 4 && r == 2) return convolve<Toom<4, 2>>(task);
  if (m == 3 && r == 2) return convolve<Toom<3, 2>>(task);
  TORCH_CHECK(false, "winograd: no squares of ", m, " pixels for filters of ", r);
}

template <class E>
at::Tensor winograd_of(
    const at::Tensor& images, const at::Tensor& weights, const std::optional<at::Tensor>& bias,
    int64_t m, int64_t r, Image in, Image out) {
  auto y = at::empty({images.size(0), out.channels, out.height, out.width},
                     images.options().memory_format(at::MemoryFormat::ChannelsLast));
  auto tiles = [&](int64_t pixels) {
    int64_t of_each = (pixels + out.before + out.stride - 1) / out.stride;
    return (of_each + m - 1) / m;
  };
  int64_t tiles_y = tiles(out.height), tiles_x = tiles(out.width);
  convolve(m, r, Task<E>{
      in, out, images.size(0) * tiles_y * tiles_x, tiles_y, tiles_x,
      images.const_data_ptr<E>(), weights.const_data_ptr<E>(),
      bias ? bias->const_data_ptr<E>() : nullptr, y.template mutable_data_ptr<E>()});
  return y;
}

at::Tensor winograd(
    const at::Tensor& x, const at::Tensor& weights, const std::optional<at::Tensor>& bias,
    int64_t m, int64_t r, int64_t height, int64_t width, int64_t stride_in, int64_t stride_out,
    int64_t before_in, int64_t before_out) {
  TORCH_CHECK(x.dim() == 4 && weights.dim() == 3, "winograd: images or weights of another rank");
  int64_t n = m + r - 1, channels = x.size(1);
  int64_t channels_out = weights.size(2) / (stride_out * stride_out);
  TORCH_CHECK(
      weights.size(0) == n * n && weights.size(1) == channels * stride_in * stride_in &&
          weights.size(2) == channels_out * stride_out * stride_out,
      "winograd: weights of ", weights.sizes(), " for images of ", x.sizes());
  TORCH_CHECK(channels % 8 == 0 && channels_out % 8 == 0, "winograd: channels in eights only");
  TORCH_CHECK(
      weights.is_contiguous() && weights.scalar_type() == x.scalar_type() &&
          (!bias || (bias->is_contiguous() && bias->numel() == channels_out &&
                     bias->scalar_type() == x.scalar_type())),
      "winograd: weights, bias and images of one type, in a row");
  auto images = x.contiguous(at::MemoryFormat::ChannelsLast);
  Image in{x.size(2), x.size(3), channels, stride_in, before_in};
  Image out{height, width, channels_out, stride_out, before_out};
  if (x.scalar_type() == at::kFloat) {
    return winograd_of<float>(images, weights, bias, m, r, in, out);
  }
  TORCH_CHECK(x.scalar_type() == at::kBFloat16, "winograd: no images of ", x.scalar_type());
  return winograd_of<at::BFloat16>(images, weights, bias, m, r, in, out);
}

}  // namespace

TORCH_LIBRARY_IMPL(ebm_dist, CPU, library) { library.impl("winograd", winograd); }
