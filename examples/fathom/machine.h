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

// f32 operations per second (a multiply-add counts two) of `threads` threads that do nothing else,
// by the widest vectors of this machine; 0 where that is not known.  A tenth of a second.
double measure_multiply_rate(int threads);

// Processor time that this process has used, of all its threads.
double process_seconds();

// Processors that this process may use.
int usable_processors();

}  // namespace cli
