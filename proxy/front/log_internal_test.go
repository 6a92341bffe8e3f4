package front

import (
	"bytes"
	"encoding/json"
	"errors"
	"testing"

	"github.com/rs/zerolog"
	"go.uber.org/zap"
)

// What certmagic warns of ends up in our log as a warning, what it fails at as
// an error, each with its fields; the rest of what it says does not.
func TestCertmagicIsHeardFromWarningsOn(t *testing.T) {
	var out bytes.Buffer
	log := zap.New(zapToZerolog{log: zerolog.New(&out)}).Named("maintenance").With(zap.String("host", "localhost"))
	for _, c := range []struct {
		say   func(string, ...zap.Field)
		level string // "" when it is dropped
	}{{log.Debug, ""}, {log.Info, ""}, {log.Warn, "warn"}, {log.Error, "error"}} {
		out.Reset()
		c.say("renewal", zap.Error(errors.New("disk full")))
		if c.level == "" {
			if out.Len() != 0 {
				t.Errorf("log = %s, want nothing", out.String())
			}
			continue
		}
		var got map[string]string
		if err := json.Unmarshal(out.Bytes(), &got); err != nil {
			t.Fatalf("log = %q: %v", out.String(), err)
		}
		want := map[string]string{"level": c.level, "message": "renewal", "logger": "maintenance", "host": "localhost", "error": "disk full"}
		for k, v := range want {
			if got[k] != v {
				t.Errorf("%s = %q, want %q", k, got[k], v)
			}
		}
	}
}
