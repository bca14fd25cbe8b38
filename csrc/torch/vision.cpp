// Patches of the vision tower: tensors to Params to kernels, one picture after the other.
#include "kvkeye/vision.h"
#include "checks.h"
#include "kvkeye/common/blocks.h"

namespace kvkeye {
namespace {

struct Picture {
  int64_t frames, height, width, first_row;
  int64_t rows() const { return frames * height * width; }
};

// The pictures of a flat list of (t, rows, columns), with the packed row at which each starts.
std::vector<Picture> pictures_of(const char* op, const std::vector<int64_t>& grid_thw) {
  require(grid_thw.size() % 3 == 0, op, ": grid_thw has ", grid_thw.size(),
          " numbers; expected triples (t, rows, columns).");
  std::vector<Picture> pictures;
  int64_t row = 0;
  for (size_t i = 0; i < grid_thw.size(); i += 3) {
    const Picture picture{grid_thw[i], grid_thw[i + 1], grid_thw[i + 2], row};
    require(picture.frames > 0 && picture.height > 0 && picture.width > 0, op, ": grid_thw holds (",
            picture.frames, ", ", picture.height, ", ", picture.width, "); every size must be positive.");
    pictures.push_back(picture);
    row += picture.rows();
  }
  return pictures;
}

int64_t rows_of(const std::vector<Picture>& pictures) {
  return pictures.empty() ? 0 : pictures.back().first_row + pictures.back().rows();
}

void check_table(const char* op, const Tensor& table) {
  const Argument argument{op, "table", table};
  argument.has_dim(3, "[n, n, d]");
  argument.has_shape({table.size(0), table.size(0), table.size(2)});
  require(table.size(0) > 0, op, ": table has shape ", shape_text(table), "; it must not be empty.");
}

Tensor interpolate_position(const Tensor& table, const std::vector<int64_t>& grid_thw) {
  const char* op = "interpolate_position";
  check_table(op, table);
  const std::vector<Picture> pictures = pictures_of(op, grid_thw);
  const int64_t dim = table.size(2);
  const Tensor source = dense(table), out = empty(table, {rows_of(pictures), dim});
  with_type({op, "table", table}, [&](auto type) {
    using T = decltype(type);
    for (const Picture& picture : pictures) {
      const InterpolatePositionParams<T> params{read<T>(source), write<T>(out) + picture.first_row * dim,
                                                table.size(0),   dim,
                                                picture.height,  picture.width};
      for_items(picture.rows(), 4 * dim,
                [&](int64_t begin, int64_t end) { cpu::interpolate_position(params, begin, end); });
    }
  });
  return out;
}

Tensor interpolate_position_backward(const Tensor& grad, const Tensor& table,
                                     const std::vector<int64_t>& grid_thw) {
  const char* op = "interpolate_position_backward";
  check_table(op, table);
  const std::vector<Picture> pictures = pictures_of(op, grid_thw);
  const int64_t side = table.size(0), dim = table.size(2);
  const Argument argument{op, "grad", grad};
  argument.has_shape({rows_of(pictures), dim});
  argument.has_dtype(table.scalar_type());
  const Tensor upstream = dense(grad);
  const Tensor sums = torch::stable::new_zeros(table, {side, side, dim}, ScalarType::Float);
  with_type({op, "table", table}, [&](auto type) {
    using T = decltype(type);
    for (const Picture& picture : pictures) {
      const InterpolatePositionBackwardParams<T> params{read<T>(upstream) + picture.first_row * dim,
                                                        write<float>(sums),
                                                        side,
                                                        dim,
                                                        picture.frames,
                                                        picture.height,
                                                        picture.width};
      for_items(blocks_of(dim, kColumnBlock), picture.rows() * kColumnBlock,
                [&](int64_t begin, int64_t end) { cpu::interpolate_position_backward(params, begin, end); });
    }
  });
  return torch::stable::to(sums, table.scalar_type());
}

std::vector<Picture> windows_of(const char* op, const std::vector<int64_t>& grid_thw, int64_t merge) {
  require(merge >= 1, op, ": merge is ", merge, "; expected at least 1.");
  const std::vector<Picture> pictures = pictures_of(op, grid_thw);
  for (const Picture& picture : pictures)
    require(picture.height % merge == 0 && picture.width % merge == 0, op, ": a grid is ", picture.height,
            " x ", picture.width, "; both sides must be multiples of merge = ", merge, ".");
  return pictures;
}

void run_merge(const std::vector<Picture>& pictures, const Tensor& source, const Tensor& target,
               int64_t merge, int64_t row_bytes, int64_t source_stride, bool split) {
  for (const Picture& picture : pictures) {
    const int64_t source_start = picture.first_row * (split ? row_bytes : source_stride);
    const MergePatchesParams params{read<char>(source) + source_start,
                                    write<char>(target) + picture.first_row * row_bytes,
                                    picture.height,
                                    picture.width,
                                    merge,
                                    row_bytes,
                                    source_stride,
                                    split};
    for_items(picture.rows() / (merge * merge), merge * merge * row_bytes / 4,
              [&](int64_t begin, int64_t end) { cpu::merge_patches(params, begin, end); });
  }
}

Tensor merge_patches(const Tensor& x, const std::vector<int64_t>& grid_thw, int64_t merge) {
  const char* op = "merge_patches";
  const Argument argument{op, "x", x};
  argument.has_dim(2, "[N, d]");
  const std::vector<Picture> pictures = windows_of(op, grid_thw, merge);
  argument.has_shape({rows_of(pictures), x.size(1)});
  const Rows rows = as_rows(argument);
  const Tensor out = empty(x, {x.size(0) / (merge * merge), merge * merge * x.size(1)});
  const int64_t size = (int64_t)x.element_size();
  run_merge(pictures, rows.tensor, out, merge, x.size(1) * size, rows.stride * size, false);
  return out;
}

Tensor merge_patches_backward(const Tensor& grad, const std::vector<int64_t>& grid_thw, int64_t merge) {
  const char* op = "merge_patches_backward";
  const Argument argument{op, "grad", grad};
  argument.has_dim(2, "[N / merge^2, merge^2 d]");
  const std::vector<Picture> pictures = windows_of(op, grid_thw, merge);
  const int64_t area = merge * merge, dim = grad.size(1) / area;
  argument.has_shape({rows_of(pictures) / area, dim * area});
  const Tensor upstream = dense(grad), out = empty(grad, {rows_of(pictures), dim});
  const int64_t row_bytes = dim * (int64_t)grad.element_size();
  run_merge(pictures, upstream, out, merge, row_bytes, row_bytes, true);
  return out;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(kvkeye_cpu, CPU, m) {
  m.impl("interpolate_position", TORCH_BOX(&interpolate_position));
  m.impl("interpolate_position_backward", TORCH_BOX(&interpolate_position_backward));
  m.impl("merge_patches", TORCH_BOX(&merge_patches));
  m.impl("merge_patches_backward", TORCH_BOX(&merge_patches_backward));
}

} // namespace kvkeye
