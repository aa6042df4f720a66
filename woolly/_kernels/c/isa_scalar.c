#define WOOLLY_TABLE woolly_kernels_scalar
#include "table.h"
