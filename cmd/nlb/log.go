package main

import (
	"fmt"
	"io"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"nlb/balancer/events"
	"nlb/config"
)

// newLogger logs to w. Its level can be changed while it runs. Sync it at the end.
func newLogger(s config.LogSettings, w io.Writer) (*zap.Logger, zap.AtomicLevel, error) {
	level, err := zap.ParseAtomicLevel(s.Level)
	if err != nil {
		return nil, level, fmt.Errorf("log.level: %w", err)
	}
	ec := logEncoding()
	encoder := zapcore.NewJSONEncoder(ec)
	if s.Format == "console" {
		ec.EncodeLevel = zapcore.CapitalLevelEncoder
		encoder = zapcore.NewConsoleEncoder(ec)
	}
	var log *zap.Logger
	writer := newLogWriter(w, func(lines int) {
		log.Warn("lines of the log were lost: nobody read it", events.LogLinesLost.Field(), zap.Int("lines", lines))
	})
	log = zap.New(zapcore.NewCore(encoder, writer, level))
	return log, level, nil
}

// logEncoding is how values look in the log, and in events.
func logEncoding() zapcore.EncoderConfig {
	ec := zap.NewProductionEncoderConfig()
	ec.EncodeTime = zapcore.RFC3339NanoTimeEncoder
	ec.EncodeDuration = zapcore.StringDurationEncoder
	return ec
}
