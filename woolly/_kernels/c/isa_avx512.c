#define WOOLLY_TABLE woolly_kernels_avx512
#include "table.h"
