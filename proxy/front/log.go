package front

import (
	"log"
	"strings"

	"github.com/rs/zerolog"
	"go.uber.org/zap/zapcore"
)

// errorLog carries what net/http has to say: failed TLS handshakes and the like,
// which are clients' doing, and panics.
func errorLog(l zerolog.Logger) *log.Logger { return log.New(serverErrors{l}, "", 0) }

type serverErrors struct{ log zerolog.Logger }

func (s serverErrors) Write(p []byte) (int, error) {
	level := zerolog.DebugLevel
	if strings.HasPrefix(string(p), "http: panic serving") {
		level = zerolog.ErrorLevel // that one is ours
	}
	s.log.WithLevel(level).Str("err", strings.TrimSpace(string(p))).Msg("connection")
	return len(p), nil
}

// zapToZerolog carries certmagic's log lines over.
type zapToZerolog struct {
	log    zerolog.Logger
	fields []zapcore.Field
}

// Enabled implements zapcore.Core. What certmagic tells below warnings is of
// use to its own developers.
func (z zapToZerolog) Enabled(l zapcore.Level) bool { return l >= zapcore.WarnLevel }

// With implements zapcore.Core.
func (z zapToZerolog) With(f []zapcore.Field) zapcore.Core {
	return zapToZerolog{z.log, append(z.fields[:len(z.fields):len(z.fields)], f...)}
}

// Check implements zapcore.Core.
func (z zapToZerolog) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if z.Enabled(e.Level) {
		return ce.AddCore(e, z)
	}
	return ce
}

// Write implements zapcore.Core.
func (z zapToZerolog) Write(e zapcore.Entry, fields []zapcore.Field) error {
	enc := zapcore.NewMapObjectEncoder()
	for _, f := range append(z.fields[:len(z.fields):len(z.fields)], fields...) {
		f.AddTo(enc)
	}
	level := zerolog.WarnLevel
	if e.Level > zapcore.WarnLevel {
		level = zerolog.ErrorLevel
	}
	z.log.WithLevel(level).Str("logger", e.LoggerName).Fields(enc.Fields).Msg(e.Message)
	return nil
}

// Sync implements zapcore.Core.
func (z zapToZerolog) Sync() error { return nil }
