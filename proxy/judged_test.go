package proxy_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"tidemark/audit"
	"tidemark/audit/audittest"
	"tidemark/proxy/upstream/upstreamtest"
)

func content(t *testing.T, mediaType string, v any) upstreamtest.Content {
	t.Helper()
	body, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return upstreamtest.NewContent(mediaType, body)
}

func descriptorOf(c upstreamtest.Content, annotations ...string) ocispec.Descriptor {
	d := ocispec.Descriptor{MediaType: c.MediaType, Digest: c.Digest, Size: int64(len(c.Body))}
	for i := 0; i < len(annotations); i += 2 {
		if d.Annotations == nil {
			d.Annotations = make(map[string]string)
		}
		d.Annotations[annotations[i]] = annotations[i+1]
	}
	return d
}

// forPlatform is an image's place in an index.
func forPlatform(img upstreamtest.Image, arch string) ocispec.Descriptor {
	d := descriptorOf(img.Manifest)
	d.Platform = &ocispec.Platform{OS: "linux", Architecture: arch}
	return d
}

// built is an image as its builder makes it: layers of a base, layers of its own, the
// steps of these, and annotations that say what it is.
func built(t *testing.T, base, own []string, annotations map[string]string) upstreamtest.Image {
	t.Helper()
	cfg := ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"}}
	m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Annotations: annotations}
	m.SchemaVersion = 2
	var img upstreamtest.Image
	for i, l := range append(append([]string{}, base...), own...) {
		c := upstreamtest.NewContent(ocispec.MediaTypeImageLayer, []byte(l))
		step := "COPY " + strings.TrimRight(l, "0123456789") // the same, whatever is copied
		if i < len(base) {
			step = "ADD " + l
		}
		cfg.RootFS.DiffIDs = append(cfg.RootFS.DiffIDs, c.Digest)
		cfg.History = append(cfg.History, ocispec.History{CreatedBy: step})
		img.Layers, m.Layers = append(img.Layers, c), append(m.Layers, descriptorOf(c))
	}
	img.Config = content(t, ocispec.MediaTypeImageConfig, cfg)
	m.Config = descriptorOf(img.Config)
	img.Manifest = content(t, ocispec.MediaTypeImageManifest, m)
	return img
}

// A rebuild on a new base is one only if the layers below are those that we saw the
// base move to: what an image says of itself is not enough. A version that grows is
// a release, one that shrinks a rollback.
func TestClassesOfMoves(t *testing.T) {
	says := func(version, base string) map[string]string {
		return map[string]string{ocispec.AnnotationVersion: version, ocispec.AnnotationBaseImageName: base}
	}
	m := newMirror(t, settings{})
	push := func(repo, tag string, img upstreamtest.Image) {
		t.Helper()
		m.hub.Push("library/"+repo, tag, img)
		m.pull(repo, tag, img)
	}
	push("debian", "13", built(t, nil, []string{"rootfs1"}, nil))
	push("app", "1", built(t, []string{"rootfs1"}, []string{"app1"}, says("1.2", "debian:13")))
	push("debian", "13", built(t, nil, []string{"rootfs2"}, nil))
	for _, tt := range []struct {
		what  string
		image upstreamtest.Image
		class audit.Class
	}{
		{"on the base that we saw", built(t, []string{"rootfs2"}, []string{"app2"}, says("1.2", "debian:13")), audit.ClassBaseRefresh},
		{"on layers that only say so", built(t, []string{"rootfs-evil"}, []string{"app2"}, says("1.2", "debian:13")), audit.ClassRebuild},
		{"on a base that we never saw", built(t, []string{"rootfs2"}, []string{"app2"}, says("1.2", "alpine:3")), audit.ClassRebuild},
		{"the base as it was first", built(t, []string{"rootfs1"}, []string{"app3"}, says("1.2", "debian:13")), audit.ClassRebuild},
		{"another version", built(t, []string{"rootfs1"}, []string{"app4"}, says("1.10", "debian:13")), audit.ClassRelease},
		{"an older version", built(t, []string{"rootfs1"}, []string{"app5"}, says("1.9", "debian:13")), audit.ClassRollback},
		{"no version at all", built(t, []string{"rootfs1"}, []string{"app6"}, nil), audit.ClassUnknown},
	} {
		push("app", "1", tt.image)
		events := audittest.Check(t, m.store)
		if e := events[len(events)-1]; e.Class != tt.class {
			t.Errorf("%s: %s %s %v, want %s", tt.what, e.Type, e.Class, e.Signals, tt.class)
		}
	}
}

// certificate is one as Fulcio gives it.
func certificate(t *testing.T, workflow string) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	san, err := url.Parse("https://github.com/acme/" + workflow)
	if err != nil {
		t.Fatal(err)
	}
	issuer, err := asn1.MarshalWithParams("https://token.actions.githubusercontent.com", "utf8")
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), URIs: []*url.URL{san},
		ExtraExtensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 57264, 1, 8}, Value: issuer}},
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// cosigned puts a signature where cosign's tags have it.
func cosigned(t *testing.T, m *mirror, d digest.Digest, der []byte) {
	t.Helper()
	payload := upstreamtest.NewContent("application/vnd.dev.cosign.simplesigning.v1+json", []byte("{}"))
	man := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: descriptorOf(payload)}
	man.SchemaVersion = 2
	man.Layers = []ocispec.Descriptor{descriptorOf(payload, "dev.sigstore.cosign/certificate", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))}
	m.hub.PushManifest("library/app", "sha256-"+d.Encoded()+".sig", content(t, ocispec.MediaTypeImageManifest, man))
}

// bundled puts a statement of sigstore's where the referrers API lists it.
func bundled(t *testing.T, m *mirror, d digest.Digest, der []byte, predicate string) {
	t.Helper()
	statement, err := json.Marshal(map[string]string{"predicateType": predicate})
	if err != nil {
		t.Fatal(err)
	}
	bundle := content(t, "application/vnd.dev.sigstore.bundle.v0.3+json", map[string]any{
		"verificationMaterial": map[string]any{"certificate": map[string]string{"rawBytes": base64.StdEncoding.EncodeToString(der)}},
		"dsseEnvelope":         map[string]string{"payload": base64.StdEncoding.EncodeToString(statement)},
	})
	m.hub.PushBlobs(bundle)
	man := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, ArtifactType: bundle.MediaType, Config: ocispec.DescriptorEmptyJSON, Layers: []ocispec.Descriptor{descriptorOf(bundle)}}
	man.SchemaVersion = 2
	m.hub.Refer("library/app", d, bundle.MediaType, content(t, ocispec.MediaTypeImageManifest, man))
}

// attested is an index with an attestation of BuildKit's.
func attested(t *testing.T, m *mirror, img upstreamtest.Image, predicates ...string) upstreamtest.Index {
	t.Helper()
	x := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{descriptorOf(img.Manifest)}}
	x.SchemaVersion = 2
	x.Manifests[0].Platform = &ocispec.Platform{OS: "linux", Architecture: "amd64"}
	if len(predicates) > 0 {
		a := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: descriptorOf(img.Config)}
		a.SchemaVersion = 2
		for _, p := range predicates {
			a.Layers = append(a.Layers, descriptorOf(img.Config, "in-toto.io/predicate-type", p))
		}
		att := content(t, ocispec.MediaTypeImageManifest, a)
		m.hub.PushManifest("library/app", att.Digest.String(), att)
		d := descriptorOf(att, "vnd.docker.reference.type", "attestation-manifest", "vnd.docker.reference.digest", img.Manifest.Digest.String())
		d.Platform = &ocispec.Platform{OS: "unknown", Architecture: "unknown"}
		x.Manifests = append(x.Manifests, d)
	}
	return upstreamtest.Index{Manifest: content(t, ocispec.MediaTypeImageIndex, x), Images: []upstreamtest.Image{img}}
}

// What stood beside an image and does not stand beside the one that its tag moves to
// is a signal of the move. Signatures come after the image: only when they are missed
// ten minutes later, too, it is an event of its own, once.
func TestTrustIsMissed(t *testing.T) {
	const slsa, spdx, signed = "https://slsa.dev/provenance/v1", "https://spdx.dev/Document", "https://sigstore.dev/cosign/sign/v1"
	release, other := certificate(t, "release.yml"), certificate(t, "other.yml")
	for name, tt := range map[string]struct {
		old, new, later func(m *mirror, d digest.Digest) // put what stands beside a digest
		oldAtt, newAtt  []string
		signals         string
		event           audit.Type // "" for none
	}{
		"nothing ever": {signals: "[]"},
		"a signature is gone": {
			old:     func(m *mirror, d digest.Digest) { cosigned(t, m, d, release) },
			signals: "[signature_lost]", event: audit.Downgraded,
		},
		"a signature comes late": {
			old:     func(m *mirror, d digest.Digest) { cosigned(t, m, d, release) },
			later:   func(m *mirror, d digest.Digest) { cosigned(t, m, d, release) },
			signals: "[signature_lost]",
		},
		"signed as before, in the other place": {
			old: func(m *mirror, d digest.Digest) { cosigned(t, m, d, release) }, new: func(m *mirror, d digest.Digest) { bundled(t, m, d, release, signed) },
			signals: "[]",
		},
		"signed by somebody else": {
			old: func(m *mirror, d digest.Digest) { bundled(t, m, d, release, signed) }, new: func(m *mirror, d digest.Digest) { cosigned(t, m, d, other) },
			signals: "[signer_changed]", event: audit.TrustChanged,
		},
		"signed by somebody with a name that is an attack": {
			old:     func(m *mirror, d digest.Digest) { cosigned(t, m, d, certificate(t, strings.Repeat("x", 70_000)+"%1b")) },
			signals: "[signature_lost]", event: audit.Downgraded,
		},
		"provenance and SBOM are gone": {oldAtt: []string{slsa, spdx}, signals: "[provenance_lost sbom_lost]", event: audit.Downgraded},
		"only the SBOM is gone":        {oldAtt: []string{slsa, spdx}, newAtt: []string{slsa}, signals: "[sbom_lost]"},
		"provenance by another way": {
			oldAtt: []string{slsa}, new: func(m *mirror, d digest.Digest) { bundled(t, m, d, release, slsa) },
			signals: "[]",
		},
	} {
		t.Run(name, func(t *testing.T) {
			clk := newClock()
			m := newMirror(t, settings{now: clk.Now})
			put := func(f func(*mirror, digest.Digest), layer string, att []string) digest.Digest {
				x := attested(t, m, upstreamtest.NewImage("base", layer), att...)
				m.hub.PushIndex("library/app", "1", x)
				if f != nil {
					f(m, x.Manifest.Digest)
				}
				m.get("/v2/app/manifests/1")
				return x.Manifest.Digest
			}
			put(tt.old, "old", tt.oldAtt)
			clk.advance(time.Hour)
			d := put(tt.new, "new", tt.newAtt)
			events := audittest.Check(t, m.store)
			if e := events[len(events)-1]; e.Type != audit.Moved || fmt.Sprint(e.Signals) != tt.signals {
				t.Fatalf("%s %v, want a move with %s", e.Type, e.Signals, tt.signals)
			}
			if tt.later != nil {
				tt.later(m, d)
			}
			for range 4 { // at 6, 12, 18 and 24 minutes
				clk.advance(6 * time.Minute)
				m.get("/v2/app/manifests/1")
			}
			events = audittest.Check(t, m.store)[2:]
			switch {
			case tt.event == "" && len(events) > 0:
				t.Errorf("events %s, want none", types(events))
			case tt.event != "" && (len(events) != 1 || events[0].Type != tt.event || events[0].New.Digest != d || !strings.HasPrefix(events[0].Reason, "before: ")):
				t.Errorf("events %s, want one %s", types(events), tt.event)
			}
		})
	}
}

// An image whose configuration cannot be had, although its clients have the old one, is
// told as such: somebody may have seen to it.
func TestWhatCannotBeComparedIsTold(t *testing.T) {
	m := newMirror(t, settings{policy: policy(t, audit.RuleText{Match: "**", Mode: audit.Alert, Escalate: []string{"user_to_root"}})})
	old, next := upstreamtest.NewImage("base", "old"), upstreamtest.NewImage("base", "new")
	m.hub.Push("library/app", "1", old)
	m.pull("app", "1", old)
	m.hub.Push("library/app", "1", next)
	m.hub.Break(upstreamtest.Fault{Name: upstreamtest.Status, At: 404, Path: "/blobs/" + next.Config.Digest.String()})
	m.pull("app", "1", old)
	events := audittest.Check(t, m.store)
	if e := events[1]; fmt.Sprint(e.Signals) != "[not_compared]" || events[2].Type != audit.Held || events[2].Reason != "user_to_root" {
		t.Errorf("%s %v, %s", e.Type, e.Signals, types(events))
	}
}

// The second push after one that is held is compared with what is served.
func TestMovesAreComparedWithWhatIsServed(t *testing.T) {
	m := newMirror(t, settings{policy: policy(t, audit.RuleText{Match: "**", Mode: audit.Alert, Escalate: []string{"trust.downgraded"}})})
	put := func(layer string, signed bool) upstreamtest.Image {
		img := upstreamtest.NewImage("base", layer)
		m.hub.Push("library/app", "1", img)
		if signed {
			cosigned(t, m, img.Manifest.Digest, certificate(t, "release.yml"))
		}
		return img
	}
	good := put("good", true)
	m.pull("app", "1", good)
	for _, layer := range []string{"evil", "evil again"} {
		put(layer, false)
		m.pull("app", "1", good)
	}
	fixed := put("fixed", true)
	m.pull("app", "1", fixed)
}
