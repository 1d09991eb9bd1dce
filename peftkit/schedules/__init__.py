"""Who trains when: schedules that turn base parameters on and off while a model trains. They inject nothing."""
