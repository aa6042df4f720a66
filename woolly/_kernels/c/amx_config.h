/* How the eight tiles of AMX are shaped: the 64 bytes that ldtilecfg reads. */
#ifndef WOOLLY_AMX_CONFIG_H
#define WOOLLY_AMX_CONFIG_H

#include <stdint.h>

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16]; /* of tile i */
    uint8_t rows[16];
} amx_config;
_Static_assert(sizeof(amx_config) == 64, "ldtilecfg");

/* GCC 12 believes that only 8 of the 64 bytes are read, and leaves out the writing of the others */
#define AMX_LOAD_CONFIG(CONFIG)                                                                                        \
    do {                                                                                                               \
        __asm__ volatile("" : : "m"(CONFIG));                                                                          \
        _tile_loadconfig(&(CONFIG));                                                                                   \
    } while (0)

#endif
