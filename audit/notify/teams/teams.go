// Package teams posts Adaptive Cards to a workflow of Microsoft Teams ("Post to a
// channel when a webhook request is received").
package teams

import (
	"context"
	"encoding/json"
	"net/http"

	"tidemark/audit"
	"tidemark/audit/notify"
)

// A Sink is a workflow.
type Sink struct{ post *notify.Poster }

// New returns the sink at an address.
func New(address string) (*Sink, error) {
	post, err := notify.NewPoster(address)
	return &Sink{post}, err
}

// textMost keeps a card below the 28 KB that Teams takes.
const textMost = 16_000

var colours = map[audit.Severity]string{audit.Info: "default", audit.Notice: "accent", audit.Warning: "warning", audit.High: "warning", audit.Critical: "attention"}

// Send implements notify.Sink.
func (s *Sink) Send(ctx context.Context, m notify.Message) error {
	type element struct {
		Type   string `json:"type"`
		Text   string `json:"text"`
		Weight string `json:"weight,omitempty"`
		Size   string `json:"size,omitempty"`
		Color  string `json:"color,omitempty"`
		Font   string `json:"fontType,omitempty"`
		Wrap   bool   `json:"wrap"`
	}
	type card struct {
		Schema  string    `json:"$schema"`
		Type    string    `json:"type"`
		Version string    `json:"version"`
		Body    []element `json:"body"`
	}
	type attachment struct {
		ContentType string `json:"contentType"`
		Content     card   `json:"content"`
	}
	body, err := json.Marshal(struct {
		Type        string       `json:"type"`
		Attachments []attachment `json:"attachments"`
	}{"message", []attachment{{"application/vnd.microsoft.card.adaptive", card{
		"http://adaptivecards.io/schemas/adaptive-card.json", "AdaptiveCard", "1.4", []element{
			{Type: "TextBlock", Text: m.Title(), Weight: "bolder", Size: "medium", Color: colours[m.Severity()], Wrap: true},
			{Type: "TextBlock", Text: notify.Clip(m.Text(), textMost), Font: "monospace", Wrap: true},
		},
	}}}})
	if err != nil {
		return err
	}
	return s.post.Post(ctx, http.Header{"Content-Type": {"application/json"}}, body)
}
