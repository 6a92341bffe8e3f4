package oci_test

import (
	"encoding/base64"
	"fmt"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"tidemark/proxy/oci"
)

// signed is a manifest of schema 1 as Docker signs it: the signatures are put in
// before the last brace, and say what stood there before.
func signed(payload string) string {
	cut := strings.LastIndex(payload, "\n}")
	tail := payload[cut:]
	protected := fmt.Sprintf(`{"formatLength":%d,"formatTail":%q,"time":"2015-01-01T00:00:00Z"}`, cut, base64.RawURLEncoding.EncodeToString([]byte(tail)))
	return payload[:cut] + fmt.Sprintf(",\n   \"signatures\": [{\"header\":{},\"signature\":\"x\",\"protected\":%q}]\n}", base64.RawURLEncoding.EncodeToString([]byte(protected)))
}

// A signed manifest of schema 1 has the digest of what was signed; nothing else has
// such a digest.
func TestSignedDigest(t *testing.T) {
	payload := "{\n   \"schemaVersion\": 1,\n   \"name\": \"library/app\",\n   \"fsLayers\": []\n}"
	if got, want := oci.SignedDigest([]byte(signed(payload))), digest.FromString(payload); got != want {
		t.Errorf("the digest is %s, want %s", got, want)
	}
	for _, other := range []string{
		"", "{}", payload, strings.Replace(signed(payload), `"schemaVersion": 1`, `"schemaVersion": 2`, 1),
		`{"schemaVersion":1,"signatures":[{"protected":"!"}]}`,
		`{"schemaVersion":1,"signatures":[{"protected":"` + base64.RawURLEncoding.EncodeToString([]byte(`{"formatLength":1000000}`)) + `"}]}`,
		`{"schemaVersion":1,"signatures":[{"protected":"` + base64.RawURLEncoding.EncodeToString([]byte(`{"formatLength":-1}`)) + `"}]}`,
	} {
		if got := oci.SignedDigest([]byte(other)); got != "" {
			t.Errorf("of %q it is %s, want none", other, got)
		}
	}
}
