// Package discord posts to a webhook of Discord.
package discord

import (
	"context"
	"encoding/json"
	"net/http"
	"strings"

	"tidemark/audit"
	"tidemark/audit/notify"
)

// A Sink is a webhook.
type Sink struct{ post *notify.Poster }

// New returns the sink at an address.
func New(address string) (*Sink, error) {
	post, err := notify.NewPoster(address)
	return &Sink{post}, err
}

// What an embed takes, in characters.
const (
	titleMost = 256
	textMost  = 4000
)

// colours are of the stripe beside a message.
var colours = map[audit.Severity]int{audit.Info: 0x8a8a8a, audit.Notice: 0x2f81f7, audit.Warning: 0xd4a017, audit.High: 0xe8710a, audit.Critical: 0xd1242f}

// Send implements notify.Sink.
func (s *Sink) Send(ctx context.Context, m notify.Message) error {
	type embed struct {
		Title       string `json:"title"`
		Description string `json:"description"`
		Color       int    `json:"color"`
	}
	var v struct {
		Embeds   []embed `json:"embeds"`
		Mentions struct {
			Parse []string `json:"parse"`
		} `json:"allowed_mentions"` // nobody: a tag's name is not ours
	}
	v.Mentions.Parse = []string{}
	text := strings.ReplaceAll(m.Text(), "```", "'''")
	v.Embeds = []embed{{notify.Clip(m.Title(), titleMost), "```\n" + notify.Clip(text, textMost) + "\n```", colours[m.Severity()]}}
	body, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return s.post.Post(ctx, http.Header{"Content-Type": {"application/json"}}, body)
}
