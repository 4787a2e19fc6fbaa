// What a worker does in absorbed attention: a block of columns (token, head) over the rows of one
// split.  Two forms of the same arithmetic: f32 throughout, and bf16 pairs with f32 sums where fast
// numerics have kernels for them.  How the work is cut: attention_absorbed.cc.
#pragma once

#include "cpu/attention_tiles.h"
#include "cpu/cpu_context.h"
#include "fathom/backend.hpp"

namespace fathom::cpu {

// What follows from the shapes.
struct AbsorbedShape {
  int64_t latent, latent_padded, key_dim, stride;  // values of a tile's row
  int64_t stage_floats;
  int64_t n_columns, n_workers;
  AbsorbedShape(const CpuContext&, const AttendAbsorbedParams&) noexcept;
};

// Running state of a block of columns, as an empty split begins it.
struct AbsorbedPartial {
  float *max, *sum;  // [cols]
  float* out;        // [cols][latent_padded]
};

// A block of columns: [first, first + n), computed as n_padded whole vectors.
struct AbsorbedBlock {
  int64_t first, n, n_padded;
};

// Rows [first, end) of a split that this call has and any query sees.
struct SplitRows {
  int64_t first, end;
};

// A worker's part of the workspace.
struct AbsorbedScratch {
  int64_t* gathered;  // first column and number of columns of the queries that lie here
  float* tile;        // f32: [kAttendTileRows][stride]: latent, zeros to a full unit, rope;
                      // pairs: rows on their way to them, [stage_floats]
  float* scores;      // [rows of a tile][cols]
  float* decay;       // [cols]
  int32_t* limits;    // [cols]
  AbsorbedPartial partial;
  float* queries;  // f32 form: [key_dim][cols]
  // Pairs.
  uint32_t* query_pairs;  // [cols / 16][key_dim / 2][16]
  uint16_t* keys;         // [kPairTileRows][stride]
  uint32_t* values;       // [latent_padded / 16][kValuePanel]
  uint32_t* weights;      // [kPairTileRows / 2][cols]
};
AbsorbedScratch carve_absorbed(Workspace&, const CpuContext&, const AbsorbedShape&) noexcept;

// Once per call and worker, before the others.
void begin_absorbed(const CpuContext&, const AbsorbedShape&, const AbsorbedScratch&) noexcept;
// Brings the queries of `block` into the scratch, unless they lie there.
void gather_absorbed(const CpuContext&, const AttendAbsorbedParams&, const AbsorbedShape&,
                     const AbsorbedScratch&, const AbsorbedBlock&) noexcept;
// Attention of a gathered block over `rows`, from an empty state.
void attend_split(const CpuContext&, const AttendAbsorbedParams&, const AbsorbedShape&,
                  const AbsorbedScratch&, const AbsorbedBlock&, const SplitRows& rows,
                  const AbsorbedPartial&) noexcept;

}  // namespace fathom::cpu
