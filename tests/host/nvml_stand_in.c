/* Two cards that answer as NVML does, for hosts without a driver. The file STAND_IN_LOST names a card that is lost;
   the file STAND_IN_HANGS one that never answers; the file STAND_IN_XID has the number of an XID of card 0, which is reported once. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { LOST = 15, NOT_SUPPORTED = 3, TIMEOUT = 10, INVALID = 2 };
typedef struct { int number; } Card;
static Card cards[2] = {{0}, {1}};

static int number_in(const char *variable) {
    const char *path = getenv(variable);
    FILE *file = path ? fopen(path, "r") : NULL;
    int number = -1;
    if (file) {
        if (fscanf(file, "%d", &number) != 1) number = -1;
        fclose(file);
    }
    return number;
}
#define REACHED(card) if (number_in("STAND_IN_LOST") == (card)->number) return LOST

int nvmlInitWithFlags(unsigned flags) { return 0; }
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, Card **card) {
    if (index > 1) return INVALID;
    REACHED(&cards[index]);
    *card = &cards[index];
    return 0;
}
int nvmlDeviceGetUUID(Card *card, char *text, unsigned length) { snprintf(text, length, "GPU-%d", card->number); return 0; }
int nvmlDeviceGetName(Card *card, char *text, unsigned length) { snprintf(text, length, "RTX 3090"); return 0; }
int nvmlDeviceGetPciInfo_v3(Card *card, char *info) {
    sprintf(info + 16 + 5 * 4, "00000000:0%d:00.0", card->number + 1);
    return 0;
}
int nvmlDeviceGetTemperature(Card *card, int sensor, unsigned *celsius) {
    while (number_in("STAND_IN_HANGS") == card->number) pause();
    REACHED(card);
    *celsius = 71;
    return 0;
}
int nvmlDeviceGetCurrentClocksEventReasons(Card *card, unsigned long long *bits) { *bits = 0x44; return 0; }
int nvmlDeviceGetPowerUsage(Card *card, unsigned *milliwatts) { *milliwatts = 312500; return 0; }
int nvmlDeviceGetMemoryInfo(Card *card, unsigned long long *total_free_used) {
    total_free_used[0] = 24ull << 30, total_free_used[1] = 23ull << 30, total_free_used[2] = 1ull << 30;
    return 0;
}
int nvmlDeviceGetTemperatureThreshold(Card *card, int kind, unsigned *celsius) { *celsius = 95; return 0; }
int nvmlDeviceGetClockInfo(Card *card, int kind, unsigned *mhz) { *mhz = 1695; return 0; }
int nvmlDeviceGetCurrPcieLinkGeneration(Card *card, unsigned *generation) { *generation = 4; return 0; }
int nvmlDeviceGetCurrPcieLinkWidth(Card *card, unsigned *width) { *width = 8; return 0; }
int nvmlDeviceGetPcieReplayCounter(Card *card, unsigned *count) { return NOT_SUPPORTED; }

/* What is asked before a run alone. */
int nvmlSystemGetDriverVersion(char *text, unsigned length) { snprintf(text, length, "580.95.05"); return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = 13010; return 0; }
int nvmlDeviceGetEnforcedPowerLimit(Card *card, unsigned *milliwatts) { *milliwatts = 235000; return 0; }
int nvmlDeviceGetPowerManagementDefaultLimit(Card *card, unsigned *milliwatts) { *milliwatts = 350000; return 0; }
int nvmlDeviceGetEccMode(Card *card, int *now, int *pending) { return NOT_SUPPORTED; }
int nvmlDeviceGetCudaComputeCapability(Card *card, int *major, int *minor) { *major = 8, *minor = 6; return 0; }
int nvmlDeviceGetMaxClockInfo(Card *card, int kind, unsigned *mhz) { *mhz = 2100; return 0; }
int nvmlDeviceGetMaxPcieLinkGeneration(Card *card, unsigned *generation) { *generation = 4; return 0; }
int nvmlDeviceGetMaxPcieLinkWidth(Card *card, unsigned *width) { *width = 16; return 0; }
int nvmlDeviceGetP2PStatus(Card *one, Card *other, int what, int *status) { *status = what == 0 ? 2 : 6; return 0; }
struct process { unsigned pid; unsigned long long used; unsigned gpu, compute; };
int nvmlDeviceGetComputeRunningProcesses_v3(Card *card, unsigned *count, struct process *found) {
    if (card->number) { *count = 0; return 0; }
    if (!found) { *count = 1; return 7; }
    *count = 1;
    found[0] = (struct process){getppid(), 512ull << 20, -1, -1};
    return 0;
}

int nvmlEventSetCreate(Card **set) { *set = &cards[0]; return 0; }
int nvmlDeviceRegisterEvents(Card *card, unsigned long long kinds, Card *set) { return 0; }

struct event { Card *card; unsigned long long kind, data; unsigned gpu, compute; };
int nvmlEventSetWait_v2(Card *set, struct event *event, unsigned milliseconds) {
    static int reported;
    int number = number_in("STAND_IN_XID");
    usleep(1000 * (milliseconds < 20 ? milliseconds : 20));
    if (reported || number < 0) return TIMEOUT;
    reported = 1;
    *event = (struct event){&cards[0], 8, number, 0, 0};
    return 0;
}
