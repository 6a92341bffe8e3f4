// Package webhook posts events as CloudEvents, or in plain JSON, signed as Standard
// Webhooks 1.0.0 has it.
package webhook

import (
	"context"
	"crypto/ed25519"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"

	"tidemark/audit/notify"
)

// The formats.
const (
	CloudEvents = "cloudevents"     // one, or an array of them for a message of several
	Plain       = "plain"           // title, text and severity, with the leaves
	Slack       = "slack"           // a text, as those take it that are like Slack
	Registry    = "distribution-v2" // what clients get from here on, as a registry tells of pushes
)

// bodyMost bounds a body in bytes (Standard Webhooks, "Payload size"). Of a larger one the
// data of each event is referred to.
const bodyMost = 20 << 10

// A Sink is a webhook.
type Sink struct {
	post   *notify.Poster
	format string
	keys   []key
	now    func() time.Time
}

// A key signs a text.
type key struct {
	version string
	sign    func(text []byte) []byte
}

// New returns the sink at an address. Secrets are one a line, so that keys can be
// changed while both are valid: whsec_ and base64 for HMAC, whsk_ and base64 of an
// ed25519 seed or private key, and anything else is an HMAC key as it is.
func New(address, format, secrets string) (*Sink, error) {
	post, err := notify.NewPoster(address)
	if err != nil {
		return nil, err
	}
	s := &Sink{post: post, format: format, now: time.Now}
	for n, line := range strings.Split(secrets, "\n") {
		if line = strings.TrimSpace(line); line == "" {
			continue
		}
		k, err := parseKey(line)
		if err != nil {
			return nil, fmt.Errorf("secret in line %d: %w", n+1, err)
		}
		s.keys = append(s.keys, k)
	}
	return s, nil
}

func parseKey(secret string) (key, error) {
	symmetric := func(k []byte) (key, error) {
		return key{"v1", func(text []byte) []byte {
			mac := hmac.New(sha256.New, k)
			mac.Write(text)
			return mac.Sum(nil)
		}}, nil
	}
	if encoded, ok := strings.CutPrefix(secret, "whsec_"); ok {
		k, err := base64.StdEncoding.DecodeString(encoded)
		if err != nil {
			return key{}, errors.New("it begins with whsec_ and is not base64")
		}
		return symmetric(k)
	}
	encoded, ok := strings.CutPrefix(secret, "whsk_")
	if !ok {
		return symmetric([]byte(secret))
	}
	seed, err := base64.StdEncoding.DecodeString(encoded)
	if err != nil || len(seed) != ed25519.SeedSize && len(seed) != ed25519.PrivateKeySize {
		return key{}, errors.New("it begins with whsk_ and is not an ed25519 key in base64")
	}
	private := ed25519.NewKeyFromSeed(seed[:ed25519.SeedSize])
	return key{"v1a", func(text []byte) []byte { return ed25519.Sign(private, text) }}, nil
}

// plain is a message in format Plain.
type plain struct {
	ID       string            `json:"id"`
	Severity string            `json:"severity"`
	Title    string            `json:"title"`
	Text     string            `json:"text"`
	Events   []json.RawMessage `json:"events"`
}

// Send implements notify.Sink.
func (s *Sink) Send(ctx context.Context, m notify.Message) error {
	body, contentType, err := s.body(m)
	if err != nil || body == nil {
		return err // of a message that has nothing to say in the format nobody is told
	}
	stamp := strconv.FormatInt(s.now().Unix(), 10)
	head := http.Header{"Content-Type": {contentType}, "Webhook-Id": {m.ID}, "Webhook-Timestamp": {stamp}}
	var signatures []string
	for _, k := range s.keys {
		signed := k.sign([]byte(m.ID + "." + stamp + "." + string(body)))
		signatures = append(signatures, k.version+","+base64.StdEncoding.EncodeToString(signed))
	}
	if signatures != nil {
		head.Set("Webhook-Signature", strings.Join(signatures, " "))
	}
	return s.post.Post(ctx, head, body)
}

func (s *Sink) body(m notify.Message) (body []byte, contentType string, err error) {
	switch s.format {
	case Plain:
		p := plain{ID: m.ID, Severity: m.Severity().String(), Title: m.Title(), Text: m.Text()}
		for _, i := range m.Items {
			p.Events = append(p.Events, i.Leaf)
		}
		if body, err = json.Marshal(p); err == nil && len(body) > bodyMost {
			p.Events, p.Text = nil, notify.Clip(p.Text, bodyMost/2) // what is escaped may be twice as long
			body, err = json.Marshal(p)
		}
		return body, "application/json", err
	case Slack:
		body, err = json.Marshal(map[string]string{"text": notify.Clip(m.Title()+"\n"+m.Text(), bodyMost/2)})
		return body, "application/json", err
	case Registry:
		body, err = registryBody(m)
		return body, "application/vnd.docker.distribution.events.v2+json", err
	}
	return cloudEvents(m)
}

// cloudEvents is an event or, of several, a batch.
func cloudEvents(m notify.Message) ([]byte, string, error) {
	batch := make([]notify.CloudEvent, len(m.Items))
	for n, i := range m.Items {
		batch[n] = i.CloudEvent(m.Origin)
	}
	encode := func() ([]byte, string, error) {
		if len(batch) == 1 {
			body, err := json.Marshal(batch[0])
			return body, "application/cloudevents+json", err
		}
		body, err := json.Marshal(batch)
		return body, "application/cloudevents-batch+json", err
	}
	body, contentType, err := encode()
	if err != nil || len(body) <= bodyMost {
		return body, contentType, err
	}
	for n := range batch {
		if m.Items[n].Index >= 0 { // what is no entry of the log can be had nowhere else
			batch[n] = batch[n].Referred()
		}
	}
	return encode()
}
