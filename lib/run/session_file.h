// Saving a session and restoring it: what Session::save and Session::restore do, with the places
// where tests reach in.  Format: session_file_format.h.
#pragma once

#include <string>

#include "../io/replace_file.h"
#include "session_state.h"

namespace fathom::run {

// Errors: as Session::save_to.
Status write_session(const SessionState&, const WriteFunction&, const RunOptions&);
// Errors: as Session::save.
Status save_session(const SessionState&, const std::string& path, const RunOptions&,
                    io::FileCalls&);

// Whether checksums are compared.  Without them the reader must be as safe: fuzz targets say so.
enum class Checksums : bool { kIgnored, kVerified };
// Errors: as Session::restore_from.
Result<Session> read_session(const Model&, const ReadFunction&, int64_t size_bytes,
                             const SessionOptions&, const RunOptions&, Checksums);

}  // namespace fathom::run
