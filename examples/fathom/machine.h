// Facts about the process and the machine that the reports show.
#pragma once

#include <cstdint>

namespace cli {

// VmHWM: the most memory that this process has had resident, in bytes; 0 when it is not known.
int64_t rss_peak_bytes();
// VmRSS: what is resident now.
int64_t rss_bytes();

struct ReadBandwidth {
  double best = 0, worst = 0;  // bytes per second over the passes, all threads together
  int64_t buffer_bytes = 0;
  int threads = 0;
};

// What `threads` threads read together from a buffer several times as large as the caches:
// the bound of everything that streams weights.  Takes about a second and the buffer's memory,
// which is given back.  best is 0 when the buffer could not be had.
ReadBandwidth measure_read_bandwidth(int threads);

// Processors that this process may use.
int usable_processors();

}  // namespace cli
