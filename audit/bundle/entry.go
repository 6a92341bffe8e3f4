package bundle

import (
	"archive/tar"
	"bytes"
	"fmt"
	"strconv"
	"time"
)

// block is the unit of a tar.
const block = 512

var zeros [2 * block]byte // also the end of a tar

// header returns the header of an entry as Write writes it and as Read wants it,
// byte for byte: USTAR, after a PAX header only if the size or the name does not
// fit into that. TestHeaders holds archive/tar to these bytes.
func header(entry string, size int64) []byte {
	var b bytes.Buffer
	err := tar.NewWriter(&b).WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: entry, Size: size, Mode: 0o644, ModTime: time.Unix(0, 0)})
	if err != nil {
		panic(fmt.Sprintf("bundle: header of %q with %d bytes: %v", entry, size, err))
	}
	return b.Bytes()
}

// padding is how many zeros follow an entry of so many bytes.
func padding(size int64) int64 { return -size & (block - 1) }

// The fields of a USTAR header that are looked at to say what is wrong with one.
func sizeField(h []byte) []byte { return h[124:135] } // without the byte that ends it
func typeField(h []byte) byte   { return h[156] }

func nameField(h []byte) string {
	text := func(b []byte) string {
		b, _, _ = bytes.Cut(b, []byte{0})
		return string(b)
	}
	name := text(h[:100])
	if prefix := text(h[345:500]); prefix != "" && string(h[257:263]) == "ustar\x00" {
		name = prefix + "/" + name
	}
	return name
}

// sizeOf is the size in a header that is not checked yet, 0 if it has none.
func sizeOf(h []byte) int64 {
	n, err := strconv.ParseInt(string(sizeField(h)), 8, 64)
	if err != nil || n < 0 {
		return 0
	}
	return n
}

// kinds are the entries that a tar can have beside regular files.
var kinds = map[byte]string{
	tar.TypeLink: "a hard link", tar.TypeSymlink: "a symbolic link", tar.TypeChar: "a character device",
	tar.TypeBlock: "a block device", tar.TypeDir: "a directory", tar.TypeFifo: "a FIFO", tar.TypeCont: "a reserved type",
	tar.TypeXHeader: "a PAX header", tar.TypeXGlobalHeader: "a global PAX header", tar.TypeGNUSparse: "a sparse file",
	tar.TypeGNULongName: "a GNU long name", tar.TypeGNULongLink: "a GNU long link",
}

func kindField(h []byte) string {
	switch t := typeField(h); {
	case t == tar.TypeReg:
		return "a file"
	case kinds[t] != "":
		return kinds[t]
	default:
		return fmt.Sprintf("an entry of type %q", t)
	}
}

// misfit says how a block of a header differs from what is wanted in its place.
func misfit(entry string, got, want []byte) error {
	first := nameField(want) == entry || typeField(want) == tar.TypeXHeader
	switch {
	case bytes.Equal(got, zeros[:block]):
		return wrong(entry, "is missing: the bundle ends before it")
	case first && nameField(got) != nameField(want):
		return wrong(entry, "in its place is %s, %q", kindField(got), nameField(got))
	case first && typeField(got) != typeField(want):
		return wrong(entry, "is %s", kindField(got))
	case first && !bytes.Equal(sizeField(got), sizeField(want)):
		return wrong(entry, "has %q bytes in octal, want %q", sizeField(got), sizeField(want))
	default:
		return wrong(entry, "its header is not as it should be at byte %d", firstDifference(got, want))
	}
}
