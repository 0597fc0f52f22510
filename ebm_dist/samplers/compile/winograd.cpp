// Convolutions of channels-last images by Winograd's algorithm, a few tiles of the image at a time.
//
// Outputs are computed in squares of m x m pixels, each from n x n inputs (n = m + r - 1, filters
// of r x r), with n * n products of matrices in place of the m * m * r * r that a direct
// convolution takes (Lavin & Gray, 2016, arXiv:1509.09308). The intermediate matrices of a tile
// stay in the cache until its outputs are written. oneDNN computes the products, by way of torch.
//
// Where m does not divide an image's side, its last tiles are one pixel smaller, so that none
// reaches beyond the border: 7 x 7 pixels are computed as (3 + 2 + 2) x (3 + 2 + 2), with 100
// products in place of 144.
//
// A convolution of stride s is one over s * s images side by side, each of every s-th row and
// column. With `stride_in` the input has the channels of all s * s images. The gradient of such a
// convolution writes all of them: `stride_out`.
//
// This file is compiled after `toom.h`, as one text.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <algorithm>

namespace {

struct Image {
  int64_t height, width, channels;
  int64_t stride;  // the image is read as stride * stride images side by side
  int64_t before;  // rows and columns of zero padding before the first
};

// Tiles along a side of an image: first the `large` ones of m pixels, then those of m - 1.
struct Side {
  int64_t tiles, large;

  Side(int64_t pixels, int64_t m)
      : tiles((pixels + m - 1) / m), large(std::max<int64_t>(pixels - tiles * (m - 1), 0)) {}
};

template <class E>
struct Task {
  Image in, out;
  int64_t num_images;
  Side down, across;
  const E *x, *weights, *bias;  // weights (n * n, channels in, channels out)
  E* y;
};

// A thread's share of the tiles, at most `size` at a time.
template <class T, class E>
class Chunk {
  static constexpr int m = T::m, n = T::n;
  const Task<E>& task;
  int64_t wide_in, wide_out;  // channels of all images side by side
  int64_t gap_in, gap_out;    // from one of the n * n matrices to the next
  at::Tensor memory;
  float* products;     // n * n of (tiles, wide_out)
  E *moved;            // n * n of (tiles, wide_in)
  E *zeros, *nowhere;  // read and written in place of pixels beyond the border

 public:
  Chunk(const Task<E>& task, int64_t size)
      : task(task),
        wide_in(task.in.stride * task.in.stride * task.in.channels),
        wide_out(task.out.stride * task.out.stride * task.out.channels),
        // One cache line of padding: without it all n * n matrices map to the same few cache sets.
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
    Rows rows = each(first, count, [&](auto y, auto x, const Tile& tile) {
      read<typename decltype(y)::of, typename decltype(x)::of>(tile);
    });
    for (int i = 0; i < n * n; i++) {
      if (rows.of(i) == 0) continue;
      at::native::cpublas::brgemm(
          rows.of(i), wide_out, wide_in, wide_in, wide_out, wide_out, false, moved + i * gap_in,
          task.weights + i * wide_in * wide_out, products + i * gap_out);
    }
    each(first, count, [&](auto y, auto x, const Tile& tile) {
      write<typename decltype(y)::of, typename decltype(x)::of>(tile);
    });
  }

 private:
  // The number of rows of each of the n * n matrices. A smaller tile has no row in the matrices of
  // the point at infinity.
  struct Rows {
    int64_t num[2][2] = {};

    int64_t of(int matrix) const { return num[matrix / n == n - 1][matrix % n == n - 1]; }
    void add(bool large_y, bool large_x) {
      num[0][0]++;
      num[1][0] += large_y;
      num[0][1] += large_x;
      num[1][1] += large_y && large_x;
    }
  };
  struct Tile {
    int64_t image, y, x;
    Rows rows;  // index of its row in each of the matrices
  };

  // Calls `visit` for every tile, with T or T::Smaller for its height and for its width; returns
  // the number of rows.
  template <class Visit>
  Rows each(int64_t first, int64_t count, Visit visit) const {
    constexpr Type<T> large;
    constexpr Type<typename T::Smaller> small;
    auto begin = [](const Side& side, int64_t i) {
      return i * m - std::max<int64_t>(i - side.large, 0);
    };
    int64_t per_image = task.down.tiles * task.across.tiles;
    Rows rows;
    for (int64_t t = first; t < first + count; t++) {
      int64_t i = t % per_image / task.across.tiles, j = t % task.across.tiles;
      bool large_y = i < task.down.large, large_x = j < task.across.large;
      Tile tile{t / per_image, begin(task.down, i), begin(task.across, j), rows};
      if (large_y && large_x) visit(large, large, tile);
      if (large_y && !large_x) visit(large, small, tile);
      if (!large_y && large_x) visit(small, large, tile);
      if (!large_y && !large_x) visit(small, small, tile);
      rows.add(large_y, large_x);
    }
    return rows;
  }

  // Finds the addresses of a tile's `high` x `wide` pixels; `outside` for those beyond the border.
  template <int high, int wide, class P>
  static void pixels(const Image& of, const Tile& tile, int64_t p, int64_t q, P* base, P* outside,
                     P** found) {
    for (int i = 0; i < high; i++) {
      int64_t h = of.stride * (tile.y + i) + p - of.before;
      for (int j = 0; j < wide; j++) {
        int64_t w = of.stride * (tile.x + j) + q - of.before;
        bool inside = h >= 0 && h < of.height && w >= 0 && w < of.width;
        found[i * wide + j] =
            inside ? base + ((tile.image * of.height + h) * of.width + w) * of.channels : outside;
      }
    }
  }

  // The addresses of a tile's row in each matrix.
  template <class P>
  class Row {
    P* of_kind[2][2];
    int64_t gap;

   public:
    Row(P* base, const Rows& rows, int64_t wide, int64_t gap) : gap(gap) {
      for (int i = 0; i < 4; i++) of_kind[i / 2][i % 2] = base + rows.num[i / 2][i % 2] * wide;
    }
    P* of(int i, int j) const { return of_kind[i == n - 1][j == n - 1] + (i * n + j) * gap; }
  };

  // For a tile of Y x X. Its loops must be unrolled, or the numbers go through memory.
  template <class Y, class X, int lanes>
  static void read_lanes(const E* const* from, int64_t c, Row<E> to, int64_t c_to) {
    using L = Lanes<lanes>;
    typename L::type patch[Y::n * X::n], out[Y::n * X::n];
#pragma GCC unroll 36
    for (int i = 0; i < Y::n * X::n; i++) patch[i] = L::load(from[i] + c);
    both_ways<InputOf<Y>, InputOf<X>>(patch, out);
#pragma GCC unroll 36
    for (int i = 0; i < Y::n * X::n; i++) L::store(to.of(i / X::n, i % X::n) + c_to, out[i]);
  }

  template <class Y, class X>
  void read(const Tile& tile) {
    const E* from[Y::n * X::n];
    Row<E> to(moved, tile.rows, wide_in, gap_in);
    const Image& in = task.in;
    int64_t before = 0;  // channels of the images before this one
    for (int64_t p = 0; p < in.stride; p++) {
      for (int64_t q = 0; q < in.stride; q++, before += in.channels) {
        pixels<Y::n, X::n, const E>(in, tile, p, q, task.x, zeros, from);
        int64_t c = 0;
        for (; c + 16 <= in.channels; c += 16) read_lanes<Y, X, 16>(from, c, to, before + c);
        for (; c < in.channels; c += 8) read_lanes<Y, X, 8>(from, c, to, before + c);
      }
    }
  }

  template <class Y, class X, int lanes>
  void write_lanes(Row<const float> from, int64_t c_from, int64_t c, E* const* to) const {
    using L = Lanes<lanes>;
    typename L::type patch[Y::n * X::n], out[Y::m * X::m];
#pragma GCC unroll 36
    for (int i = 0; i < Y::n * X::n; i++) patch[i] = L::load(from.of(i / X::n, i % X::n) + c_from);
    both_ways<OutputOf<Y>, OutputOf<X>>(patch, out);
    typename L::type bias{};
    if (task.bias != nullptr) bias = L::load(task.bias + c);
#pragma GCC unroll 36
    for (int i = 0; i < Y::m * X::m; i++) L::store(to[i] + c, out[i] + bias);
  }

  template <class Y, class X>
  void write(const Tile& tile) {
    Row<const float> from(products, tile.rows, wide_out, gap_out);
    E* to[Y::m * X::m];
    const Image& out = task.out;
    int64_t before = 0;
    for (int64_t p = 0; p < out.stride; p++) {
      for (int64_t q = 0; q < out.stride; q++, before += out.channels) {
        pixels<Y::m, X::m, E>(out, tile, p, q, task.y, nowhere, to);
        int64_t c = 0;
        for (; c + 16 <= out.channels; c += 16) write_lanes<Y, X, 16>(from, before + c, c, to);
        for (; c < out.channels; c += 8) write_lanes<Y, X, 8>(from, before + c, c, to);
      }
    }
  }
};

// Tiles per chunk: more would not stay in the cache, fewer would read the weights too often. Whole
// images of 3 x 3, 4 x 4 and 6 x 6 tiles, which are frequent, fill a chunk.
constexpr int64_t kTiles = 72;

template <class T, class E>
void convolve(const Task<E>& task) {
  int64_t per_image = task.down.tiles * task.across.tiles;
  int64_t num_tiles = task.num_images * per_image;
  if (num_tiles == 0) return;
  // Chunks of equal size, a multiple of the number of threads. Small images are kept whole, so
  // that the matrices of all chunks have the same number of rows.
  int64_t threads = at::get_num_threads();
  int64_t unit = per_image <= kTiles ? per_image : 1;
  int64_t units = num_tiles / unit, most = kTiles / unit;
  int64_t chunks = (units + most - 1) / most;
  chunks = (chunks + threads - 1) / threads * threads;
  int64_t size = (units + chunks - 1) / chunks * unit;
  chunks = (num_tiles + size - 1) / size;
  at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    Chunk<T, E> chunk(task, size);
    for (int64_t i = begin; i < end; i++) {
      chunk.run(i * size, std::min(size, num_tiles - i * size));
    }
    at::native::cpublas::brgemm_release();
  });
}

template <class E>
void convolve(int64_t m, int64_t r, const Task<E>& task) {
  if constexpr (std::is_same_v<E, float>) {  // see _SQUARES in winograd.py
    if (m == 4 && r == 3) return convolve<Toom<4, 3>>(task);
    if (m == 4 && r == 2) return convolve<Toom<4, 2>>(task);
  }
  if (m == 2 && r == 3) return convolve<Toom<2, 3>>(task);
  if (m == 3 && r == 2) return convolve<Toom<3, 2>>(task);
  TORCH_CHECK(false, "winograd: no squares of ", m, " pixels for filters of ", r);
}

template <class E>
at::Tensor winograd_of(
    const at::Tensor& images, const at::Tensor& weights, const std::optional<at::Tensor>& bias,
    int64_t m, int64_t r, Image in, Image out) {
  auto y = at::empty({images.size(0), out.channels, out.height, out.width},
                     images.options().memory_format(at::MemoryFormat::ChannelsLast));
  auto side = [&](int64_t pixels) {
    return Side((pixels + out.before + out.stride - 1) / out.stride, m);
  };
  convolve(m, r, Task<E>{
      in, out, images.size(0), side(out.height), side(out.width), images.const_data_ptr<E>(),
      weights.const_data_ptr<E>(), bias ? bias->const_data_ptr<E>() : nullptr,
      y.template mutable_data_ptr<E>()});
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
