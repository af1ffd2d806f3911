# A source tree is unpacked and built; make finds nothing to do then, and all of it again when a header is new.
cd /mnt
tar -xf /tmp/zlib.tar
cd zlib
cat >main.c <<'END'
#include <stdio.h>
#include <string.h>
#include "zlib.h"
int main(void) {
    static unsigned char in[100000], packed[110000], out[100000];
    uLongf packed_length = sizeof packed, length = sizeof out;
    for (size_t i = 0; i < sizeof in; i++) in[i] = i * i >> 7;
    if (compress(packed, &packed_length, in, sizeof in) != Z_OK) return 1;
    if (uncompress(out, &length, packed, packed_length) != Z_OK) return 2;
    if (length != sizeof in || memcmp(in, out, length)) return 3;
    printf("%lu\n", crc32(0, packed, packed_length));
    return 0;
}
END
cat >Makefile <<'END'
objects := $(patsubst %.c,%.o,$(filter-out main.c,$(wildcard *.c)))
check: main.o libz.a
	gcc -o $@ $^
libz.a: $(objects)
	ar rcs $@ $^
%.o: %.c
	gcc -O0 -MMD -DHAVE_UNISTD_H -D_LARGEFILE64_SOURCE -c -o $@ $<
-include $(wildcard *.d)
END
make -s -j2
./check
make -q
ls *.o | wc -l
touch inftrees.h
if make -q; then exit 9; fi
make -n | grep -c 'gcc -O0'
