/*
 * A tool for NVTX in the place of Nsight: NVTX loads the library that NVTX_INJECTION64_PATH names, and this one writes the
 * name of every range that is opened into the file NVTX_RECORD, a line each. The declarations are those of nvtx3's
 * nvtxDetail/nvtxTypes.h, which need not be installed.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

enum { EXPORT_CALLBACKS = 1, MODULE_CORE = 1, CORE_RANGE_PUSH_A = 9 };

typedef void (*function)(void);

struct callbacks {
    size_t struct_size;
    int (*get_module_function_table)(int module, function ***table, unsigned int *size);
};

static FILE *record;

static int range_push(const char *name)
{
    fprintf(record, "%s\n", name);
    fflush(record);
    return 0;
}

/* Called once, by NVTX; 1: ranges are recorded, 0: they are not, and the program goes on without. */
int InitializeInjectionNvtx2(const void *(*get_export_table)(uint32_t))
{
    const struct callbacks *callbacks = get_export_table(EXPORT_CALLBACKS);
    const char *path = getenv("NVTX_RECORD");
    function **table = NULL;
    unsigned int size = 0;
    if (!callbacks || !path || !callbacks->get_module_function_table(MODULE_CORE, &table, &size)) return 0;
    if (size <= CORE_RANGE_PUSH_A || !(record = fopen(path, "a"))) return 0;
    *table[CORE_RANGE_PUSH_A] = (function)range_push;
    return 1;
}
