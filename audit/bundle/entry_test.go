package bundle

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
)

// Headers are what docs/formats.md says, whatever archive/tar makes of them in a
// later Go: bundles of all releases are compared with them.
func TestHeaders(t *testing.T) {
	ustar := func(name string, mode int, size int64, kind byte) []byte {
		h := make([]byte, block)
		copy(h, name[:min(len(name), 100)])
		copy(h[100:], fmt.Sprintf("%07o\x000000000\x000000000\x00", mode)) // and no owner, no group
		copy(h[124:], fmt.Sprintf("%011o\x0000000000000\x00", size))       // and no time
		h[156] = kind
		copy(h[257:], "ustar\x0000")
		if kind == '0' {
			copy(h[329:], "0000000\x000000000\x00") // no device
		}
		sum := 8 * int(' ')
		for _, b := range h {
			sum += int(b)
		}
		copy(h[148:], fmt.Sprintf("%06o\x00 ", sum))
		return h
	}
	pax := func(name, records string) []byte {
		b := ustar(name, 0, int64(len(records)), 'x')
		return append(b, append([]byte(records), make([]byte, padding(int64(len(records))))...)...)
	}
	short, long := "blobs/sha256/"+strings.Repeat("a", 64), "blobs/sha512/"+strings.Repeat("b", 128)
	paxShort, paxLong := "blobs/sha256/PaxHeaders.0/"+strings.Repeat("a", 64), "blobs/sha512/PaxHeaders.0/"+strings.Repeat("b", 74)
	const most, more = 1<<33 - 1, 1 << 33 // eleven digits of octal, and not
	for _, tt := range []struct {
		name string
		size int64
		want []byte
	}{
		{layoutEntry, 30, ustar(layoutEntry, 0o644, 30, '0')},
		{eventsEntry, 0, ustar(eventsEntry, 0o644, 0, '0')},
		{short, most, ustar(short, 0o644, most, '0')},
		{short, more, append(pax(paxShort, "19 size=8589934592\n"), ustar(short, 0o644, 0, '0')...)},
		{long, 512, append(pax(paxLong, "151 path="+long+"\n"), ustar(long, 0o644, 512, '0')...)},
		{long, more, append(pax(paxLong, "151 path="+long+"\n19 size=8589934592\n"), ustar(long, 0o644, 0, '0')...)},
	} {
		if got := header(tt.name, tt.size); !bytes.Equal(got, tt.want) {
			at := firstDifference(got, tt.want)
			t.Errorf("%.20s of %d bytes has a header of %d bytes, want %d; from byte %d on it is %.40q, want %.40q", tt.name, tt.size, len(got), len(tt.want), at, got[at:], tt.want[at:])
		}
	}
}
