package bundle

import (
	"encoding/base64"
	"fmt"

	"github.com/opencontainers/go-digest"
	"golang.org/x/mod/sumdb/note"
)

// signedAs is the first line of what is signed. With it, and with a last line
// that is no hash of a tree, the signature of a list is never one of a checkpoint
// (c2sp.org/tlog-checkpoint), which the same key signs.
const signedAs = "tidemark.dev/bundle/v1"

// listText is what is signed of a list.
func listText(origin string, id digest.Digest) string {
	return signedAs + "\n" + origin + "\n" + id.String() + "\n"
}

// sign returns the signature of a list.
func sign(id digest.Digest, signer note.Signer) ([]byte, error) {
	return note.Sign(&note.Note{Text: listText(signer.Name(), id)}, signer)
}

// verify checks that sig is the signature of a list, by v and in the one way in
// which it can be written: base64 has more.
func verify(sig []byte, id digest.Digest, v note.Verifier) error {
	n, err := note.Open(sig, note.VerifierList(v))
	if err != nil {
		return wrong(signatureEntry, "is not signed by the key %s: %v", keyName(v), err)
	}
	if want := listText(v.Name(), id); n.Text != want {
		return wrong(signatureEntry, "is not the signature of this list: it signs %q, want %q", n.Text, want)
	}
	raw, err := base64.StdEncoding.DecodeString(n.Sigs[0].Base64)
	if again := n.Text + "\n— " + v.Name() + " " + base64.StdEncoding.EncodeToString(raw) + "\n"; err != nil || string(sig) != again {
		return wrong(signatureEntry, "has more than the one signature of %s, or has it in another form", keyName(v))
	}
	return nil
}

func keyName(v note.Verifier) string { return fmt.Sprintf("%s+%08x", v.Name(), v.KeyHash()) }

// openKey reads a verifier as it is in a bundle, in the one way in which it can be
// written.
func openKey(vkey string) (note.Verifier, error) {
	v, err := note.NewVerifier(vkey)
	if err != nil {
		return nil, wrong(vkeyEntry, "%.200q: %v", vkey, err)
	}
	key, err := base64.StdEncoding.DecodeString(vkey[len(keyName(v)+"+"):])
	if err != nil || keyName(v)+"+"+base64.StdEncoding.EncodeToString(key) != vkey {
		return nil, wrong(vkeyEntry, "%.200q is not how the key %s is written", vkey, keyName(v))
	}
	return v, nil
}
