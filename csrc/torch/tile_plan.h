// From the starts of tiles to what a kernel walks: runs of tokens, blocks of queries, parts of keys.
#pragma once

#include "checks.h"
#include "kvkeye/video_fusion_attention.h"

#include <algorithm>

namespace kvkeye {

// Owns what a TileGeometry points to. Depends on shapes and starts only: never on the number of threads.
struct TilePlan {
  TileGeometry geometry{};
  std::vector<TileBlock> blocks;

  TilePlan(const int32_t* starts, const float* weights, int64_t tiles, int64_t length, int64_t frames,
           int64_t per_frame, int64_t tokens, int64_t dim) {
    geometry.starts = starts;
    geometry.weights = weights;
    geometry.tiles = tiles;
    geometry.length = length;
    geometry.frames = frames;
    geometry.per_frame = per_frame;
    geometry.tokens = tokens;
    find_runs();
    for (const Run& run : runs_)
      add_video(run, dim);
    add_text(dim);
    geometry.blocks = blocks.data();
    geometry.num_blocks = (int64_t)blocks.size();
  }

  TilePlan(const TilePlan&) = delete;

private:
  // Frames [begin, end) that lie in the same tiles.
  struct Run {
    int64_t begin, end;
    std::vector<int32_t> tiles;
  };

  bool covers(int64_t tile, int64_t frame) const {
    const int64_t shifted = (frame - geometry.starts[tile]) % geometry.frames;
    return (shifted < 0 ? shifted + geometry.frames : shifted) < geometry.length;
  }

  void find_runs() {
    for (int64_t frame = 0; frame < geometry.frames && geometry.per_frame > 0; ++frame) {
      std::vector<int32_t> tiles;
      for (int64_t tile = 0; tile < geometry.tiles; ++tile)
        if (covers(tile, frame))
          tiles.push_back((int32_t)tile);
      // By place in the frame's tiles, so that the order of the tiles cannot show.
      std::sort(tiles.begin(), tiles.end(),
                [&](int32_t a, int32_t b) { return place(a, frame) > place(b, frame); });
      if (runs_.empty() || runs_.back().tiles != tiles)
        runs_.push_back({frame, frame, std::move(tiles)});
      runs_.back().end = frame + 1;
    }
  }

  int64_t place(int32_t tile, int64_t frame) const {
    const int64_t shifted = (frame - geometry.starts[tile]) % geometry.frames;
    return shifted < 0 ? shifted + geometry.frames : shifted;
  }

  void add_video(const Run& run, int64_t dim) {
    std::vector<TilePart> parts;
    std::vector<uint8_t> joined;
    for (const Run& keys : runs_) {
      std::vector<uint8_t> in;
      for (const int32_t tile : run.tiles)
        in.push_back(std::count(keys.tiles.begin(), keys.tiles.end(), tile) != 0);
      if (std::count(in.begin(), in.end(), 1) == 0)
        continue;
      add_part({keys.begin * geometry.per_frame, keys.end * geometry.per_frame}, in, parts, joined);
    }
    const int64_t video = geometry.frames * geometry.per_frame;
    if (video < geometry.tokens && !run.tiles.empty()) {
      add_part({video, geometry.tokens}, std::vector<uint8_t>(run.tiles.size(), 1), parts, joined);
    }
    add_blocks(run.begin * geometry.per_frame, run.end * geometry.per_frame, std::move(parts), run.tiles,
               std::move(joined), dim);
  }

  // Neighbours in the same tiles are one part.
  static void add_part(const TilePart& keys, const std::vector<uint8_t>& in, std::vector<TilePart>& parts,
                       std::vector<uint8_t>& joined) {
    if (!parts.empty() && parts.back().end == keys.begin &&
        std::equal(in.begin(), in.end(), joined.end() - in.size())) {
      parts.back().end = keys.end;
      return;
    }
    parts.push_back(keys);
    joined.insert(joined.end(), in.begin(), in.end());
  }

  void add_text(int64_t dim) {
    const int64_t video = geometry.frames * geometry.per_frame;
    if (video < geometry.tokens)
      add_blocks(video, geometry.tokens, {{0, geometry.tokens}}, {-1}, {1}, dim);
  }

  void add_blocks(int64_t begin, int64_t end, std::vector<TilePart> parts, std::vector<int32_t> members,
                  std::vector<uint8_t> joined, int64_t dim) {
    constexpr int64_t kMostFloats = 4 << 20; // of the parts' results, per thread
    const int64_t num_parts = (int64_t)parts.size(), num_members = (int64_t)members.size();
    const int64_t fitting = kMostFloats / (std::max<int64_t>(num_parts, 1) * padded_dim(dim));
    const int64_t most = std::max<int64_t>(16, std::min(kQueryRows, fitting));
    const int64_t count = (end - begin + most - 1) / most;
    parts_.push_back(std::move(parts));
    members_.push_back(std::move(members));
    joined_.push_back(std::move(joined));
    for (int64_t i = 0; i < count; ++i) { // of equal size
      const int64_t first = begin + (end - begin) * i / count, last = begin + (end - begin) * (i + 1) / count;
      blocks.push_back({first, last, parts_.back().data(), members_.back().data(), joined_.back().data(),
                        num_parts, num_members});
      geometry.most_rows = std::max(geometry.most_rows, last - first);
    }
    geometry.most_parts = std::max(geometry.most_parts, num_parts);
    geometry.most_members = std::max(geometry.most_members, num_members);
  }

  std::vector<Run> runs_;
  std::vector<std::vector<TilePart>> parts_;
  std::vector<std::vector<int32_t>> members_;
  std::vector<std::vector<uint8_t>> joined_;
};

} // namespace kvkeye
