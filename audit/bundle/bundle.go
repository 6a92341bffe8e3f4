// Package bundle packs images, events and proofs for a place without network,
// and checks them there.
//
// A bundle is one uncompressed tar. It is an OCI image layout, so that skopeo,
// podman and docker load read the images in it, and has in tidemark/ what the
// log says of them. These entries, in this order, and nothing else:
//
//	oci-layout
//	index.json                the images, under their whole refs
//	tidemark/contents.json    the list: every other entry, with digest and size
//	tidemark/contents.sig     the log's signature of the list
//	tidemark/vkey             the verifier of the log
//	tidemark/checkpoint       the signed tree that the proofs lead to
//	tidemark/events.jsonl     what the log says of the images, each event with its proof
//	blobs/<alg>/<hex>         the manifests in the order of the list, then the blobs
//
// There is one sequence of bytes for one list: the list is sorted and encoded in
// one way, and entries have no owners and no times. Read therefore does not
// interpret a tar. It knows what must come next and takes nothing else, so that
// links, devices, paths that lead elsewhere and what readers of tars differ about
// are refused by the same comparison as a byte that was flipped on the way.
//
// The list is read and its signature checked before anything in it is believed,
// and it comes before all that it lists. Nothing is written to a disk here.
//
// docs/formats.md has the format in full.
package bundle

import (
	_ "crypto/sha256" // the algorithms of blobs
	_ "crypto/sha512"
	"fmt"

	"github.com/opencontainers/go-digest"
)

// The entries that are not content.
const (
	layoutEntry     = "oci-layout"
	indexEntry      = "index.json"
	contentsEntry   = "tidemark/contents.json"
	signatureEntry  = "tidemark/contents.sig"
	vkeyEntry       = "tidemark/vkey"
	checkpointEntry = "tidemark/checkpoint"
	eventsEntry     = "tidemark/events.jsonl"
)

// blobEntry is the entry of content.
func blobEntry(d digest.Digest) string {
	return "blobs/" + d.Algorithm().String() + "/" + d.Encoded()
}

// What is read before a signature was checked, or is held in memory, is bounded.
const (
	maxList     = 64 << 20  // of contents.json and index.json: some 400,000 blobs
	maxSmall    = 64 << 10  // of the other entries in tidemark/, but for the events
	maxLine     = 256 << 10 // of an event: a leaf of 64 KiB, in which every byte may need an escape, and its proof
	maxManifest = 4 << 20   // as much as registries take
)

// piece is how much content is read and written at once: enough that calls of the
// system cost nothing beside the hash.
const piece = 256 << 10

// layout is the content of oci-layout.
const layout = `{"imageLayoutVersion":"1.0.0"}`

// A WrongError reports a bundle that is not what it should be, whoever is to
// blame. What failed for another reason, such as reading it, is no WrongError.
type WrongError struct {
	Entry string // where: a path in the bundle, or what the list calls it
	What  string
}

func (e *WrongError) Error() string { return e.Entry + ": " + e.What }

func wrong(entry, format string, args ...any) error {
	return &WrongError{entry, fmt.Sprintf(format, args...)}
}
