// Repacking a weight matrix from its file's rows into the panels of packed.h.
#pragma once

#include <vector>

#include "packed.h"
#include "team.h"

namespace ridgeline {

// Bytes between the rows of a matrix in its file.
size_t file_row_bytes(Format format, int k);

// What a file's format is packed as: `tiles` says whether a quantized matrix is to multiply bf16 activations on tiles.
// Rows looked up in T4 would not come out exactly, since it rounds minima.
Format packed_format(Format file, bool tiles);

// The layout of a packed [n, k] matrix; its last panels are filled up with zero weights.
PackedMatrix packed_layout(Format format, int n, int k);
size_t packed_bytes(const PackedMatrix& m);

// Packs `rows` (n pointers to rows of a file, in format `from`) into `out`, packed_bytes long, zeroed and 64-byte aligned.
// Returns the index of the first row that holds a NaN or an infinity, or -1.
int pack(const std::vector<const uint8_t*>& rows, Format from, const PackedMatrix& layout, uint8_t* out, Team& team);

}  // namespace ridgeline
