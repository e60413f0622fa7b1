/* The non-causal SSD, forward and backward, for float; see nc_ssd_kernels.h. */
#include "nc_ssd.h"

#define SPAN 64   /* columns of a head whose panels fit into a first-level cache */
#define DEPTH 128 /* positions, at most, that are weighted at once */
#define AHEAD 8   /* rows that are fetched into the cache before they are needed */
#define LEAST 256 /* positions, about, that are worth a part of their own */
#define TASKS 16  /* parts of a batch element that are enough for all threads */
#define FLOAT_ONLY
#define ARGS nc_ssd_args
#define KERNELS "nc_ssd_kernels.h"
#include "instances.h"

EXPORT int visionssm_nc_ssd(const nc_ssd_args *a, int backward, int isa) { return run_best(a, 0, backward, isa); }
