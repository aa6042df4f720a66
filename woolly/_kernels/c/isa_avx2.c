#define WOOLLY_TABLE woolly_kernels_avx2
#include "table.h"
