/* A stand-in for libnvidia-ml.so.1, driven by a text file that may change while it is used.
 *
 * FAKE_NVML_PLAN names the plan, FAKE_NVML_LOG a file that gets the name of each function called.
 * A line of the plan is one of
 *     driver 580.82.07            version of the driver
 *     cuda 13000                  CUDA of the driver, 13.0
 *     cards 2                     how many there are; as the library does, this is looked at when it is opened
 *     N.key value...              a value of card N: name, uuid, total, used, reserved (MiB), power, limit, default,
 *                                 least (W), temperature, load, graphics, memory, graphics_max, memory_max (MHz),
 *                                 gen, width, gen_max, width_max, card_gen, capability (8.9), mig, reasons
 *     N.process PID MIB KIND NAME a program on card N; MIB -1: not told; KIND: compute, graphics or both
 *     fault WHO FUNCTION CODE     WHO: a card's index, or * for any and none; FUNCTION: a name or *; CODE: an
 *                                 NVML error, or hang, which lasts until the plan says otherwise
 * All else is looked at in every call. A value that is missing is NVML_ERROR_NOT_SUPPORTED. Compiled with -DOLD_DRIVER, the functions that came after
 * driver 470 are not there at all.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct card *device;
struct card { int index; };
struct process { unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance; };
struct memory { unsigned long long total, free, used; };
struct memory_v2 { unsigned version; unsigned long long total, reserved, free, used; };

enum { OK = 0, UNINITIALIZED = 1, BAD = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, TOO_SMALL = 7, LOST = 15, MISMATCH = 25 };

static struct card all[16];
static int opened, counted;

static FILE *plan(void)
{
    const char *path = getenv("FAKE_NVML_PLAN");
    return path ? fopen(path, "r") : NULL;
}

/* The rest of the first line that starts with key and a blank; 0 where there is none. */
static int find(const char *key, char *value, size_t size)
{
    FILE *file = plan();
    char line[512];
    size_t length = strlen(key);
    int found = 0;
    while (file && !found && fgets(line, sizeof line, file))
        if (!strncmp(line, key, length) && line[length] == ' ') {
            line[strcspn(line, "\n")] = 0;
            snprintf(value, size, "%s", line + length + 1);
            found = 1;
        }
    if (file)
        fclose(file);
    return found;
}

/* What the plan says shall go wrong with this function on this card: OK, a code, or -1 for a hang. */
static int fault(const char *name, int card)
{
    FILE *file = plan();
    char line[512], who[16], function[96], code[32], index[16];
    int result = OK;
    snprintf(index, sizeof index, "%d", card);
    while (file && result == OK && fgets(line, sizeof line, file))
        if (sscanf(line, "fault %15s %95s %31s", who, function, code) == 3 && (!strcmp(who, "*") || !strcmp(who, index))
            && (!strcmp(function, "*") || !strcmp(function, name)))
            result = !strcmp(code, "hang") ? -1 : atoi(code);
    if (file)
        fclose(file);
    return result;
}

static int enter(const char *name, int card)
{
    const char *log = getenv("FAKE_NVML_LOG");
    FILE *file = log ? fopen(log, "a") : NULL;
    int result;
    if (file) {
        fprintf(file, "%s %d\n", name, card);
        fclose(file);
    }
    while ((result = fault(name, card)) == -1)
        usleep(5000);
    return result == OK && !opened && strcmp(name, "nvmlInitWithFlags") ? UNINITIALIZED : result;
}

#define ENTER(card) do { int r = enter(__func__, card); if (r != OK) return r; } while (0)

static int text(int card, const char *key, char *value, unsigned size)
{
    char full[96];
    snprintf(full, sizeof full, "%d.%s", card, key);
    return find(full, value, size) ? OK : NOT_SUPPORTED;
}

static int number(int card, const char *key, double scale, unsigned *value)
{
    char found[64];
    int r = text(card, key, found, sizeof found);
    if (r == OK)
        *value = (unsigned)(atof(found) * scale);
    return r;
}

int nvmlInitWithFlags(unsigned flags)
{
    char found[32];
    (void)flags;
    ENTER(-1);
    if (!opened++)
        counted = find("cards", found, sizeof found) ? atoi(found) : 0;
    return OK;
}

int nvmlShutdown(void) { ENTER(-1); opened--; return OK; }

int nvmlSystemGetDriverVersion(char *version, unsigned size)
{
    ENTER(-1);
    return find("driver", version, size) ? OK : NOT_SUPPORTED;
}

int nvmlSystemGetCudaDriverVersion_v2(int *version)
{
    char found[32];
    ENTER(-1);
    if (!find("cuda", found, sizeof found))
        return NOT_SUPPORTED;
    *version = atoi(found);
    return OK;
}

int nvmlDeviceGetCount_v2(unsigned *count)
{
    ENTER(-1);
    *count = counted;
    return OK;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, device *handle)
{
    ENTER((int)index);
    if ((int)index >= counted || index >= 16)
        return BAD;
    all[index].index = (int)index;
    *handle = &all[index];
    return OK;
}

int nvmlDeviceGetName(device d, char *name, unsigned size) { ENTER(d->index); return text(d->index, "name", name, size); }
int nvmlDeviceGetUUID(device d, char *uuid, unsigned size) { ENTER(d->index); return text(d->index, "uuid", uuid, size); }

int nvmlDeviceGetCudaComputeCapability(device d, int *major, int *minor)
{
    char found[32];
    ENTER(d->index);
    if (text(d->index, "capability", found, sizeof found) != OK)
        return NOT_SUPPORTED;
    return sscanf(found, "%d.%d", major, minor) == 2 ? OK : BAD;
}

int nvmlDeviceGetMigMode(device d, unsigned *current, unsigned *pending)
{
    ENTER(d->index);
    *pending = 0;
    return number(d->index, "mig", 1, current);
}

#define MIB 1048576ULL
static int memory_of(int card, unsigned *total, unsigned *used, unsigned *reserved)
{
    int r = number(card, "total", 1, total);
    *used = *reserved = 0;
    number(card, "used", 1, used);
    number(card, "reserved", 1, reserved);
    return r;
}

int nvmlDeviceGetMemoryInfo(device d, struct memory *memory)
{
    unsigned total, used, reserved;
    ENTER(d->index);
    int r = memory_of(d->index, &total, &used, &reserved);
    if (r != OK)
        return r;
    memory->total = total * MIB;
    memory->used = (used + reserved) * MIB;
    memory->free = (total - used - reserved) * MIB;
    return OK;
}

#define UINT_GETTER(NAME, KEY, SCALE) \
    int NAME(device d, unsigned *value) { ENTER(d->index); return number(d->index, KEY, SCALE, value); }
UINT_GETTER(nvmlDeviceGetPowerUsage, "power", 1000)
UINT_GETTER(nvmlDeviceGetPowerManagementLimit, "limit", 1000)
UINT_GETTER(nvmlDeviceGetPowerManagementDefaultLimit, "default", 1000)
UINT_GETTER(nvmlDeviceGetCurrPcieLinkGeneration, "gen", 1)
UINT_GETTER(nvmlDeviceGetCurrPcieLinkWidth, "width", 1)
UINT_GETTER(nvmlDeviceGetMaxPcieLinkGeneration, "gen_max", 1)
UINT_GETTER(nvmlDeviceGetMaxPcieLinkWidth, "width_max", 1)
#ifndef OLD_DRIVER
UINT_GETTER(nvmlDeviceGetGpuMaxPcieLinkGeneration, "card_gen", 1)
#endif

int nvmlDeviceGetPowerManagementLimitConstraints(device d, unsigned *least, unsigned *most)
{
    ENTER(d->index);
    *most = 0;
    return number(d->index, "least", 1000, least);
}

int nvmlDeviceGetTemperature(device d, unsigned sensor, unsigned *value)
{
    (void)sensor;
    ENTER(d->index);
    return number(d->index, "temperature", 1, value);
}

int nvmlDeviceGetUtilizationRates(device d, unsigned *rates)
{
    ENTER(d->index);
    rates[1] = 0;
    return number(d->index, "load", 1, rates);
}

static int clock_of(int card, unsigned type, const char *end, unsigned *value)
{
    char key[32];
    snprintf(key, sizeof key, "%s%s", type == 2 ? "memory" : "graphics", end);
    return number(card, key, 1, value);
}

int nvmlDeviceGetClockInfo(device d, unsigned type, unsigned *mhz)
{
    ENTER(d->index);
    return clock_of(d->index, type, "", mhz);
}

int nvmlDeviceGetMaxClockInfo(device d, unsigned type, unsigned *mhz)
{
    ENTER(d->index);
    return clock_of(d->index, type, "_max", mhz);
}

int nvmlDeviceGetMemoryBusWidth(device d, unsigned *bits)
{
    ENTER(d->index);
    return number(d->index, "bus", 1, bits);
}

static int reasons_of(int card, unsigned long long *reasons)
{
    unsigned value;
    int r = number(card, "reasons", 1, &value);
    *reasons = r == OK ? value : 0;
    return r;
}

int nvmlDeviceGetCurrentClocksThrottleReasons(device d, unsigned long long *reasons)
{
    ENTER(d->index);
    return reasons_of(d->index, reasons);
}

/* As the library does: too little room is an error that says how much is needed. */
static int processes(int card, const char *kind, unsigned *count, struct process *out)
{
    FILE *file = plan();
    char line[512], key[32], found[16];
    unsigned pid, room = *count, n = 0;
    long long mib;
    snprintf(key, sizeof key, "%d.process %%u %%lld %%15s", card);
    while (file && fgets(line, sizeof line, file))
        if (sscanf(line, key, &pid, &mib, found) == 3 && (!strcmp(found, kind) || !strcmp(found, "both"))) {
            if (out && n < room) {
                out[n].pid = pid;
                out[n].used = mib < 0 ? ~0ULL : (unsigned long long)mib * MIB;
                out[n].gpu_instance = out[n].compute_instance = ~0U;
            }
            n++;
        }
    if (file)
        fclose(file);
    *count = n;
    return n > room ? TOO_SMALL : OK;
}

#define LISTS(VERSION) \
    int nvmlDeviceGetComputeRunningProcesses_##VERSION(device d, unsigned *count, struct process *out) \
    { ENTER(d->index); return processes(d->index, "compute", count, out); } \
    int nvmlDeviceGetGraphicsRunningProcesses_##VERSION(device d, unsigned *count, struct process *out) \
    { ENTER(d->index); return processes(d->index, "graphics", count, out); }
LISTS(v2)

int nvmlSystemGetProcessName(unsigned pid, char *name, unsigned size)
{
    FILE *file;
    char line[512];
    unsigned card, found;
    int at;
    ENTER(-1);
    file = plan();
    while (file && fgets(line, sizeof line, file))
        if (sscanf(line, "%u.process %u %*s %*s %n", &card, &found, &at) == 2 && found == pid) {
            line[strcspn(line, "\n")] = 0;
            snprintf(name, size, "%s", line + at);
            fclose(file);
            return OK;
        }
    if (file)
        fclose(file);
    return NOT_FOUND;
}

#ifndef OLD_DRIVER
LISTS(v3)

int nvmlDeviceGetMemoryInfo_v2(device d, struct memory_v2 *memory)
{
    unsigned total, used, reserved;
    ENTER(d->index);
    if (memory->version != 0x02000028)
        return MISMATCH;
    int r = memory_of(d->index, &total, &used, &reserved);
    if (r != OK)
        return r;
    memory->total = total * MIB;
    memory->used = used * MIB;
    memory->reserved = reserved * MIB;
    memory->free = (total - used - reserved) * MIB;
    return OK;
}

int nvmlDeviceGetCurrentClocksEventReasons(device d, unsigned long long *reasons)
{
    ENTER(d->index);
    return reasons_of(d->index, reasons);
}
#endif

const char *nvmlErrorString(int code) { return code == LOST ? "GPU is lost" : "Error of the stand-in"; }
